/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* IEEE 802.1Q tags. */
#pragma once
#include <linux/types.h>

#define VLAN_HLEN 4
#define VLAN_VID_MASK 0x0fff

struct vlan_hdr {
	__be16 h_vlan_TCI;
	__be16 h_vlan_encapsulated_proto;
};
