/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* RFC 8200. */
#pragma once
#include <linux/types.h>

struct in6_addr {
	union {
		__u8   u6_addr8[16];
		__be16 u6_addr16[8];
		__be32 u6_addr32[4];
	} in6_u;
};

struct ipv6hdr {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	__u8            priority : 4, version : 4;
#else
	__u8            version : 4, priority : 4;
#endif
	__u8            flow_lbl[3];
	__be16          payload_len;
	__u8            nexthdr;
	__u8            hop_limit;
	struct in6_addr saddr;
	struct in6_addr daddr;
};
