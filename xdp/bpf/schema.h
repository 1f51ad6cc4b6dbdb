/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* schema.h - every struct, enum and limit that C and Python both know. Read by clang, by gcc and by cffi, so:
 * fixed widths, padding spelled out, enums for numbers, no preprocessor beyond the next line. __beNN is as on the wire.
 * Every struct here is the value of a BPF array map that userspace maps as a numpy array (xdp/tables.py). */
#pragma once

/* Capacities are map sizes, given at start; only what is part of the layout is a limit. */
enum limits {
	BUCKET_WORDS = 4,    /* u64 words of a bucket ... */
	WORD_TAGS = 4,       /* ... with four 16-bit tags each */
	BUCKET_TAGS = 16,    /* the record of tag i of bucket b is record 16 b + i */
	FRONTEND_WAYS = 4,   /* frontends of one bucket: one cache line */
	MAX_WORKERS = 64,    /* userspace packet loops of one node */
	MAX_REASONS = 128,
	BURST = 64,          /* frames that a worker handles at a time */
	STALL_MS = 50,       /* a heartbeat older than this is stale */
	IDLE_WAKE_MS = 20,   /* an idle worker wakes this often to beat */
	LAYOUT_BYTES = 16384,
};

/* Values of a tag that are not a piece of a hash. */
enum tag {
	TAG_EMPTY = 0,
	TAG_CLAIMED = 1,     /* a writer is filling the record */
	TAG_WITHDRAWN = 2,   /* readers may still look at the record: reusable after a grace period */
	TAG_FIRST = 3,
};

enum verdict { VERDICT_FORWARD, VERDICT_PASS, VERDICT_DROP, VERDICT_PUNT };

/* What became of a packet and why; also its index into the counters. The verdict of a reason is reason / 32. */
enum reason {
	REASON_FORWARDED = 0,          /* rewritten along its flow and sent */
	REASON_ADMITTED = 1,           /* the same, and this packet began the flow */

	/* PASS: to the kernel, byte for byte */
	REASON_NOT_IPV4 = 32,
	REASON_TOO_SHORT = 33,         /* a header does not fit into the frame: the kernel is the judge */
	REASON_NOT_TCP_UDP = 34,
	REASON_NOT_OURS = 35,          /* no flow, and no frontend as destination */
	REASON_OTHER_FRAGMENT = 36,    /* a fragment that is not to a VIP */
	REASON_OTHER_ICMP = 37,        /* not an error about a tracked flow */
	REASON_TTL_EXPIRED = 38,       /* so that the kernel answers */
	REASON_STALLED_PASSED = 39,    /* new flow, userspace stalled, the Service says pass */

	/* DROP */
	REASON_STALLED_DROPPED = 64,   /* new flow, userspace stalled (the default) */
	REASON_TOO_BIG = 65,           /* longer than the MTU of its next hop */
	REASON_BAD_FLAGS = 66,         /* TCP flags that no stack sends create no state */
	REASON_STRAY_RST = 67,         /* a RST to a VIP without a flow */
	REASON_NO_ENDPOINT = 68,       /* the Service has no usable endpoint */
	REASON_TABLE_FULL = 69,        /* no slot in either bucket */
	REASON_REPLY_CLASH = 70,       /* every endpoint tried has a flow with this client's port already */
	REASON_NO_NEXT_HOP = 71,       /* no route, or its neighbour does not answer */
	REASON_NEXT_HOP_QUEUE = 72,    /* the queue of frames that wait for a neighbour was full */
	REASON_FRAGMENT = 73,          /* a fragment to a VIP: not yet tracked */
	REASON_ICMP_UNUSABLE = 74,     /* an ICMP error whose quote fits no flow any more */
	REASON_NOT_FORWARDABLE = 75,   /* the next hop leaves by an interface that is not ours */
	REASON_TX_FULL = 76,           /* the transmit ring had no room */
	REASON_VANISHED = 77,          /* punted, but neither a flow nor a frontend now */

	/* PUNT: to the userspace worker of this queue */
	REASON_NEW_FLOW = 96,
	REASON_REOPENED = 97,          /* a SYN on a closing flow */
	REASON_VIP_FRAGMENT = 98,
	REASON_ICMP_ERROR = 99,
	REASON_NOT_OFFLOADED = 100,    /* engine afxdp: every packet of a flow */
	REASON_PUNT_LOST = 101,        /* punted, and lost before userspace saw it: a full ring */
};

enum direction { ORIGINAL, REPLY, DIRECTIONS };

enum protocol { PROTOCOL_ICMP = 1, PROTOCOL_TCP = 6, PROTOCOL_UDP = 17 };

/* State of a connection, kept in both of its records. The transitions are conntrack/states.py. */
enum state {
	STATE_FREE,
	STATE_SYN_SENT,
	STATE_SYN_RECEIVED,
	STATE_ADOPTED,        /* picked up in mid-stream, no reply seen yet */
	STATE_ESTABLISHED,
	STATE_FIN_ORIGINAL,   /* the client has closed, the endpoint may still send */
	STATE_FIN_REPLY,
	STATE_TIME_WAIT,
	STATE_CLOSING,        /* a RST was seen */
	STATE_UDP_UNREPLIED,
	STATE_UDP_REPLIED,
	STATES,
};

/* What a packet tells the state machine. */
enum event { EVENT_DATA, EVENT_SYN, EVENT_SYN_ACK, EVENT_ACK, EVENT_FIN, EVENT_RST, EVENT_INVALID, EVENTS };

/* The tags of a bucket: half a cache line, compared a word at a time. */
struct bucket {
	__u64 word[BUCKET_WORDS];
};

/* One direction of a connection, one cache line. Everything up to `peer` is constant between publication and reuse,
 * `state` is stored on change, and the rest is written only by packets of this direction. */
struct flow {
	__be32 src_addr;       /* the five-tuple of the packets that this record is for ... */
	__be32 dst_addr;
	__be16 src_port;
	__be16 dst_port;
	__u8   protocol;
	__u8   direction;
	__u16  ip_delta;       /* to be added to the IPv4 header checksum, one's complement (RFC 1624); TTL - 1 included */
	__be32 new_src_addr;   /* ... and how they leave */
	__be32 new_dst_addr;
	__be16 new_src_port;
	__be16 new_dst_port;
	__u16  l4_delta;       /* the same for the TCP or UDP checksum: pseudo header and ports */
	__u8   state;
	__u8   pad;
	__u32  next_hop;       /* row of next_hops */
	__u32  peer;           /* slot of the other direction's record */
	__u32  last_seen;      /* jiffies, lower 32 bits */
	__u32  pad2;
	__u64  packets;
	__u64  bytes;          /* frames, Ethernet header included */
};

/* (address, port, protocol) that a client dials. Port and protocol 0: the address is a VIP. The first eight bytes are
 * the key and are stored as one word; a key of zero is a free place. */
struct frontend {
	__be32 addr;
	__be16 port;
	__u8   protocol;
	__u8   used;           /* 1: there is a frontend here */
	__u32  service;        /* row of services */
	__u32  pad;
};

enum when_stalled { WHEN_STALLED_DROP, WHEN_STALLED_PASS };

/* A Service port. Immutable while a frontend holds its row; its slots are `slots` entries of the flat maglev array from first_slot on. */
struct service {
	__u32 first_slot;
	__u32 slots;           /* 0: no usable endpoint */
	__u8  when_stalled;
	__u8  pad[7];
};

/* Sixteen slots: array maps round a row up to eight bytes. Userspace sees the flat array. */
struct maglev_line {
	__u32 endpoint[16];    /* row of endpoints */
};

struct endpoint {
	__be32 addr;
	__be16 port;
	__u16  pad;
	__u32  next_hop;
	__u32  pad2;
};

enum hop_state {
	HOP_UNRESOLVED,        /* no route or no neighbour yet */
	HOP_FORWARD,           /* addresses and interface are known, and we may transmit there */
	HOP_FOREIGN,           /* resolved, but by an interface that is not ours */
};

/* Where a packet goes next. The twelve address bytes lie as in the frame. */
struct next_hop {
	__u8  dst_mac[6];
	__u8  src_mac[6];
	__u32 ifindex;
	__u32 mtu;
	__u8  state;
	__u8  prefix_len;      /* 32: the row leads to one host; less: to what is behind a route's gateway */
	__u8  used;            /* 1: handed out; row 0 never is, and stays unresolved */
	__u8  pad;
	__be32 destination;    /* host or network that the row leads to: a successor resolves it anew */
	__u32 pad2;
};

/* Words that everybody reads and hardly anybody writes. */
struct control {
	__u64 hash_key[2];     /* drawn when the table is created */
	__u32 hertz;           /* jiffies per second */
	__u32 aged_from;       /* no flow is idle since before this (jiffies): set by a takeover */
	__u32 stall_jiffies;
	__u32 next_hop_epoch;  /* grows with every change of a next hop, so that held frames are tried again */
	__u8  pad[32];
};

/* A packet loop. Its first word is a heartbeat that XDP compares, the second its quiescent states. */
struct worker {
	__u64 heartbeat;       /* jiffies of its last turn; 0: no loop */
	__u64 turn;
	__u8  pad[48];
};

/* The state machine as the packet paths apply it; conntrack/states.py writes it. Indices are masked, so sizes are
 * powers of two: next_state[state << 4 | direction << 3 | event]. */
struct machine {
	__u8  event_of_flags[64];  /* TCP flags FIN SYN RST PSH ACK URG */
	__u8  next_state[256];
	__u8  first_state[8];      /* by event of a connection's first packet; 0: it creates none */
	__u8  pad[8];
	__u8  reopens[16];         /* by state: a SYN begins another connection */
	__u8  early_drop[16];      /* by state: 0 never, else the class that makes room first (1) or next (2) */
	__u32 timeout[16];         /* jiffies, by state */
};

/* A row of counters: XDP has one per CPU, userspace one per worker. */
struct counters {
	__u64 packets[MAX_REASONS];     /* [reason] */
};

/* What the tables were created with, as JSON: another layout or capacity is refused by name. */
struct layout {
	__u8 text[LAYOUT_BYTES];
};
