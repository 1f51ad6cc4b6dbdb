/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bcc sizes ring buffers by it. */
#pragma once
#define PAGE_SHIFT 12
#define PAGE_SIZE (1UL << PAGE_SHIFT)
