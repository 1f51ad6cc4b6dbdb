/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bcc looks for this file to recognise kernel headers, and for this option before it compiles anything. */
#pragma once
#define CONFIG_BPF_SYSCALL 1
