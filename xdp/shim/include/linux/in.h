/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* IP protocol numbers. */
#pragma once

#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ICMPV6 58
