/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Empty: the classes of instructions, which only an assembler needs. */
#pragma once
