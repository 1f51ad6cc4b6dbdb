/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* RFC 826. */
#pragma once
#include <linux/types.h>

#define ARPHRD_ETHER 1
#define ARPOP_REQUEST 1
#define ARPOP_REPLY 2

struct arphdr {
	__be16 ar_hrd;
	__be16 ar_pro;
	__u8   ar_hln;
	__u8   ar_pln;
	__be16 ar_op;
};
