/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* words.h - the u64 words through which the programs here are told what to do and tell what they saw. Read by clang and
 * by cffi (perf/traffic.py), like xdp/bpf/schema.h. */
#pragma once

/* What the generator sends. Addresses and ports as plain numbers, MACs as the frame's bytes in the low end. */
enum order {
	ORDER_NEXT,        /* flow of the next frame: grows by one per frame ... */
	ORDER_FLOWS,       /* ... and begins again here */
	ORDER_NEW_EVERY,   /* every so many frames, one begins a flow; 0: none does */
	ORDER_SINCE_NEW,   /* frames since the last that did */
	ORDER_NEXT_NEW,    /* the flow that is begun next: grows for ever */
	ORDER_DST_MAC,
	ORDER_SRC_MAC,
	ORDER_CLIENT,      /* flow f is of client CLIENT + f / SOURCE_PORTS ... */
	ORDER_SERVER,      /* ... to or, when what is sent is replies, from this address ... */
	ORDER_SERVERS,     /* ... and this many from it on, by turns of f */
	ORDER_SERVER_PORT,
	ORDER_IFINDEX,     /* where the frames are transmitted */
	ORDER_STEP,        /* TCP: which of enum step */
	ORDER_STAMPED,     /* not 0: the payload says when the frame was due */
	ORDER_LATE,        /* nanoseconds by which this burst is behind its time */
	ORDER_MIXED,       /* not 0: frames of the lengths of the internet mix */
	ORDER_CLIENT_NET,  /* IPv6: the first eight bytes of addresses; four of zero follow, then the number */
	ORDER_SERVER_NET,
	ORDER_NET_SUM,     /* what both sum up to */
	ORDERS,
};

/* What a client sends of a TCP connection. The server adds SYN-ACK and FIN-ACK. */
enum step {
	STEP_SYN,
	STEP_ACK,
	STEP_FIN,
	STEP_LAST_ACK,
	STEPS,
};

/* What the sink saw, one row of words per CPU. */
enum seen {
	SEEN_PACKETS,      /* packets of the generator */
	SEEN_TRANSLATED,   /* of those, packets to an endpoint's or from a Service's port */
	SEEN_WRONG,        /* of those, packets whose IPv4, UDP or TCP checksum is wrong: counted by TASK_VERIFY only */
	SEEN_FIRST,        /* when the first packet to TOLD_ADDR came, nanoseconds: noted by TASK_WATCH only */
	SEENS = 8,         /* a row is a cache line */
};

/* What the sink is told. In a map of its own: it is read on every CPU, written hardly ever. */
enum told {
	TOLD_TASK,         /* one of enum sink_task */
	TOLD_ADDR,         /* for TASK_WATCH; of IPv6 the last four bytes */
	TOLDS,
};

/* What the sink does with a packet beside counting it. */
enum sink_task {
	TASK_DROP,
	TASK_VERIFY,       /* check its checksums, then drop it */
	TASK_REFLECT,      /* send it back to where it came from: a reply */
	TASK_CONVERSE,     /* TCP: answer SYN and FIN, drop the rest */
	TASK_TIME,         /* count how late after its stamp it is, then drop it */
	TASK_WATCH,        /* note the first that goes to TOLD_ADDR */
};

/* A delay in nanoseconds is counted in a column: 16 for each power of two. */
enum delays {
	DELAY_STEPS = 16,
	DELAY_COLUMNS = 448,
};

enum traffic {
	FIRST_SOURCE_PORT = 1024,
	SOURCE_PORTS = 32768,
	FRAME_BYTES = 60,  /* the least: 64 with the frame check sequence */
	FRAME6_BYTES = 74, /* the same for IPv6, with room for a TCP header */
	VLAN_TAG = 4,
	LONGEST_FRAME = 1514,
	CLIENT_SEQ = 1000,
	SERVER_SEQ = 2000,
};
