/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Empty: bcc brings uapi/linux/bpf.h itself, and has included it when it comes here. */
#pragma once
