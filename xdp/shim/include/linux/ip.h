/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* RFC 791. */
#pragma once
#include <linux/types.h>

#define IP_DF 0x4000
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff

struct iphdr {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	__u8    ihl : 4, version : 4;
#else
	__u8    version : 4, ihl : 4;
#endif
	__u8    tos;
	__be16  tot_len;
	__be16  id;
	__be16  frag_off;
	__u8    ttl;
	__u8    protocol;
	__sum16 check;
	__be32  saddr;
	__be32  daddr;
};
