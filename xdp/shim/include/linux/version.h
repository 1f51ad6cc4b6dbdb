/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bcc asks for a version only to choose among its own workarounds for kernels before 4.8. */
#pragma once
#define KERNEL_VERSION(major, minor, patch) (((major) << 16) + ((minor) << 8) + (patch))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)
