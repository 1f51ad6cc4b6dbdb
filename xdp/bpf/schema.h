/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* schema.h - every struct, enum and limit that C and Python both know. Read by clang, by gcc and by cffi, so:
 * fixed widths, padding spelled out, enums for numbers, no preprocessor beyond the next line. __beNN is as on the wire.
 * Nearly every struct here is the value of a BPF array map that userspace maps as a numpy array (xdp/tables.py). */
#pragma once

/* Capacities are map sizes, given at start; only what is part of the layout is a limit. */
enum limits {
	BUCKET_WORDS = 4,    /* u64 words of a bucket ... */
	WORD_TAGS = 4,       /* ... with four 16-bit tags each */
	BUCKET_TAGS = 16,    /* the record of tag i of bucket b is record 16 b + i */
	ROOM_ENOUGH = 8,     /* with so many empty tags the first bucket is taken, so that most look-ups end there */
	AFFINITY_WAYS = 8,   /* entries of one bucket: two cache lines */
	FRONTEND_WAYS = 4,   /* frontends of one bucket: one cache line */
	NAME_WAYS = 4,       /* names of one bucket: two cache lines */
	NAMES_KEPT = 4,      /* one in so many names is for configuration, whatever clients there are */
	PREFIX_FAMILY_BITS = 32,
	MAX_NAMES = 1 << 24, /* so that none looks like the address of an IPv4 host (0.0.0.0/8, RFC 1122 section 3.2.1.3) */
	MAX_WORKERS = 64,    /* userspace packet loops of one node */
	MAX_REASONS = 128,
	LED_SOCKETS = 65536, /* of this node, of which it is known which VIP they asked for; beyond that the oldest are forgotten */
	MAX_ROUTES = 131072, /* of a family, that a packet's way is looked for among */
	LEARNED_SHARE = 16,  /* one in so many next hops is for clients that XDP meets while userspace is away */
	BURST = 64,          /* frames that a worker handles at a time */
	STATE_BITS = 15,     /* of a flow's state: how it stands; those above are the number of its set of timeouts */
	TIMEOUT_SETS = 16,   /* that Services may have, of which the first is everybody's who asks for no other */
	ARP_ANSWERS = 1000,  /* a second and worker, at most; NDP's among them */
	DATAGRAMS = 4096,    /* that XDP may know to be in fragments */
	FRAGMENT_S = 30,     /* so long fragments wait for one another */
	VLAN_WORDS = 64,     /* u64 words with a bit for each VLAN */
	VLAN_TAG_BYTES = 4,  /* of two VLAN tags at most, in frames that we look into */
	STATIONS = 8,        /* MAC addresses that frames of this node are to */
	RESERVED_VLAN = 4095, /* nobody's (IEEE 802.1Q table 9-2) */
	ANSWERS = 1000,      /* the same of refusals, and of answers to echo requests; on average */
	EXTENSIONS = 4,      /* headers between IPv6 and its transport that are walked over ... */
	EXTENSION_BYTES = 128, /* ... and how long they may be together */
	STALL_MS = 50,       /* a worker that lets a punted frame wait for longer is away */
	LAYOUT_BYTES = 16384,
	TO_KERNEL_MARK = 0x7475726e, /* of a frame that userspace sends for the kernel to take as received */
};

/* Values of a tag that are not a piece of a hash. */
enum tag {
	TAG_EMPTY = 0,
	TAG_CLAIMED = 1,     /* a writer is filling the record */
	TAG_WITHDRAWN = 2,   /* readers may still look at the record: reusable after a grace period */
	TAG_RETIRED = 3,     /* withdrawn by XDP, which may reuse the record a second later */
	TAG_FIRST = 4,
};

enum verdict { VERDICT_FORWARD, VERDICT_PASS, VERDICT_DROP, VERDICT_PUNT };

/* What became of a packet and why; also its index into the counters. The verdict of a reason is reason / 32. */
enum reason {
	REASON_FORWARDED = 0,          /* rewritten along its flow and sent */
	REASON_ADMITTED = 1,           /* the same, and this packet began the flow */
	REASON_SENT_ON = 2,            /* engine raw: of no flow, but its original was dropped at ingress: routed */
	REASON_TO_KERNEL = 3,          /* rewritten along its flow, for the kernel to route */

	REASON_ARP_ANSWERED = 4,       /* a question for a VIP, by ARP or NDP, turned round */
	REASON_ECHO_ANSWERED = 5,      /* an echo request to a VIP, turned round */
	REASON_LED = 6,                /* a socket of this node, to a Service: to an endpoint in its place */

	/* PASS: to the kernel, byte for byte */
	REASON_NOT_IPV4 = 32,          /* nor IPv6 */
	REASON_TOO_SHORT = 33,         /* a header does not fit, and none says that it is to a VIP: the kernel is the judge */
	REASON_NOT_TCP_UDP = 34,       /* another protocol, not to a VIP */
	REASON_NOT_OURS = 35,          /* no flow, and not to a VIP */
	REASON_OTHER_FRAGMENT = 36,    /* a fragment that is neither to a VIP nor of a flow */
	REASON_OTHER_ICMP = 37,        /* neither to a VIP nor an error about a tracked flow */
	REASON_TTL_EXPIRED = 38,       /* so that the kernel answers */
	REASON_STALLED_PASSED = 39,    /* new flow, userspace stalled, the Service says pass */
	REASON_MID_STREAM_PASSED = 40, /* TCP from the middle of an unknown connection, and the Service says pass */

	REASON_FOR_MANY = 41,          /* IP to the MAC address of a group: a router sends none on (RFC 1812 section 5.3.4) */
	REASON_LEFT_TO_PACKETS = 42,   /* a socket of this node, to a Service that asks who sends: its packets tell */
	REASON_LEFT_TO_EGRESS = 43,    /* a reply that is translated as it leaves, after the kernel has routed it */
	REASON_VIP_CLAIMED = 44,       /* ARP or NDP by somebody who says that he has a VIP of ours */
	REASON_OTHER_VLAN = 45,        /* tagged, and of a VLAN that is not served, or with more than two tags */
	REASON_OTHER_STATION = 46,     /* to the MAC address of another machine, whatever it is: the kernel ignores it */

	/* DROP */
	REASON_STALLED_DROPPED = 64,   /* new flow, or a reply to an echo request, and userspace is stalled */
	REASON_TOO_BIG = 65,           /* longer than the MTU of its next hop; who forbids to cut it is told */
	REASON_BAD_FLAGS = 66,         /* TCP flags that no stack sends create no state */
	REASON_STRAY_RST = 67,         /* a RST to a VIP without a flow */
	REASON_NO_ENDPOINT = 68,       /* the Service has no usable endpoint: refused */
	REASON_TABLE_FULL = 69,        /* no slot in either bucket */
	REASON_REPLY_CLASH = 70,       /* every endpoint tried has a flow with this client's port already */
	REASON_NO_NEXT_HOP = 71,       /* no route, or its neighbour does not answer */
	REASON_NEXT_HOP_QUEUE = 72,    /* too many frames waited for a neighbour, and this one had come first */
	REASON_FRAGMENT_ALONE = 73,    /* a fragment whose first one was not forwarded, or has not come in time */
	REASON_ICMP_UNUSABLE = 74,     /* an ICMP error whose quote fits no flow, and none that would be adopted */
	REASON_NOT_FORWARDABLE = 75,   /* the next hop leaves by an interface that is not ours */
	REASON_TX_FULL = 76,           /* the transmit ring had no room */
	REASON_VANISHED = 77,          /* punted, but neither a flow nor a frontend now */
	REASON_NO_LOCAL_ENDPOINT = 78, /* a Local policy, and every endpoint is on another node */
	REASON_SOURCE_REFUSED = 79,    /* the client is in none of the Service's source ranges */
	REASON_NO_SNAT_PORT = 80,      /* to be masqueraded, and every port tried is taken towards this endpoint */
	REASON_NO_SNAT_ADDRESS = 81,   /* to be masqueraded, and the node has no address towards the endpoint */
	REASON_NOT_SERVED = 82,        /* to a VIP, and neither of a flow nor for a frontend: refused */
	REASON_SOURCE_ROUTED = 83,     /* IPv4 options LSRR and SSRR; an IPv6 routing header with hops to come or of type 0 */
	REASON_FRAGMENT_OVERLAP = 84,  /* a fragment that overlaps another: the datagram is given up */
	REASON_FRAGMENT_AGAIN = 85,    /* a fragment that has come before */
	REASON_FRAGMENT_BROKEN = 86,   /* too short for a transport header, too far behind, or one of too many */

	REASON_MID_STREAM_RESET = 87,  /* TCP from the middle of an unknown connection, not to be adopted: refused */
	REASON_ARP_LIMITED = 88,       /* more questions for VIPs than are answered in a second */
	REASON_ANSWER_LIMITED = 89,    /* to be refused or answered, and too many have been just now */
	REASON_MARTIAN_SOURCE = 92,    /* to a VIP, of no flow, from an address that is no host's (RFC 1122, 4291) */
	REASON_ENDPOINT_REMOVED = 93,  /* of a connection in STATE_RESET: refused */
	REASON_MALFORMED = 94,         /* to a VIP, and a header does not fit, or cannot be what it says */

	REASON_UNSUMMED = 90,          /* IPv6: UDP without a checksum, to a VIP (RFC 8200 section 8.1) */
	REASON_NAMES_FULL = 91,        /* IPv6: no room for the name of another client */

	/* PUNT: to the userspace worker of this queue */
	REASON_NEW_FLOW = 96,
	REASON_REOPENED = 97,          /* a SYN on a closing flow */
	REASON_VIP_FRAGMENT = 98,
	REASON_ICMP_ERROR = 99,
	REASON_NOT_OFFLOADED = 100,    /* engine afxdp: every packet of a flow */
	REASON_PUNT_LOST = 101,        /* punted, and lost before userspace saw it: a full ring */
	REASON_VIP_STRAY = 102,        /* to a VIP, and neither of a flow nor for a frontend */
	REASON_VIP_ECHO = 103,         /* an echo request to a VIP */
	REASON_VIP_ARP = 104,          /* who has a VIP? */
	REASON_OVERSIZED = 105,        /* longer than the MTU of its next hop */
	REASON_OPTIONS = 106,          /* of a flow, with IPv4 options or IPv6 extension headers: is one a source route? */
	REASON_FLOW_FRAGMENT = 107,    /* a fragment of a flow */
	REASON_TO_BE_RESET = 108,      /* of a connection in STATE_RESET */
	REASON_ECHO_REPLY = 109,       /* of a flow: an endpoint's answer to an echo request */
};

enum direction { ORIGINAL, REPLY, DIRECTIONS };

/* With PROTOCOL_IPV6 added, the addresses of a five-tuple are names: rows of `names`. */
enum protocol { PROTOCOL_ICMP = 1, PROTOCOL_TCP = 6, PROTOCOL_UDP = 17, PROTOCOL_ICMPV6 = 58, PROTOCOL_IPV6 = 0x80 };

/* What may stand between the IPv6 header and the transport header (RFC 8200 section 4). */
enum extension {
	EXTENSION_HOP_BY_HOP = 0,
	EXTENSION_ROUTING = 43,
	EXTENSION_FRAGMENT = 44,
	EXTENSION_DESTINATION = 60,
};

/* State of a connection, kept in both of its records. The transitions are conntrack/states.py. */
enum state {
	STATE_FREE,
	STATE_SYN_SENT,
	STATE_SYN_RECEIVED,   /* the endpoint has answered, or has gone on after a RST: the client has not yet */
	STATE_ADOPTED,        /* picked up in mid-stream, or gone on with after a RST: no reply seen yet */
	STATE_ADOPTED_FIN,    /* the same, and the client has closed */
	STATE_ESTABLISHED,
	STATE_FIN_ORIGINAL,   /* the client has closed, the endpoint may still send */
	STATE_FIN_REPLY,
	STATE_TIME_WAIT,
	STATE_CLOSING,        /* a RST was seen */
	STATE_UDP_UNREPLIED,
	STATE_UDP_REPLIED,
	STATE_RESET,          /* of TCP, whose Service has lost the endpoint: who sends next is answered with a RST */
	STATE_ECHO,           /* echo requests of one identifier, and their replies */
	STATES,
};

/* What a packet tells the state machine. */
enum event { EVENT_DATA, EVENT_SYN, EVENT_SYN_ACK, EVENT_ACK, EVENT_FIN, EVENT_RST, EVENT_INVALID, EVENT_ECHO, EVENTS };

/* The tags of a bucket: half a cache line, compared a word at a time. */
struct bucket {
	__u64 word[BUCKET_WORDS];
};

/* One direction of a connection, one cache line. Everything up to `peer` is constant while `published` is 1 and for a
 * grace period after it, `state` is stored on change, and the rest is written only by packets of this direction. */
struct flow {
	__be32 src_addr;       /* the five-tuple of the packets that this record is for ... */
	__be32 dst_addr;
	__be16 src_port;
	__be16 dst_port;
	__u8   protocol;
	__u8   published;      /* 1: may be found, and read; stored last, with release order, and taken back first */
	__u16  ip_delta;       /* to be added to the IPv4 header checksum, one's complement (RFC 1624); TTL - 1 included */
	__be32 new_src_addr;   /* ... and how they leave */
	__be32 new_dst_addr;
	__be16 new_src_port;
	__be16 new_dst_port;
	__u16  l4_delta;       /* the same for the transport's checksum: pseudo header, where there is one, and ports */
	__u8   state;          /* enum state in STATE_BITS, and its set of timeouts */
	__u8   direction;
	__u32  next_hop;       /* row of next_hops */
	__u32  peer;           /* slot of the other direction's record */
	__u32  last_seen;      /* jiffies, lower 32 bits */
	__u32  retired_at;     /* jiffies when XDP retired it */
	__u64  packets;
	__u64  bytes;          /* frames, Ethernet header included */
};

/* (address, port, protocol) that a client dials. Port and protocol 0: the address is a VIP, and its row is that of its
 * lowest port, for echo requests. The first eight bytes are the key and are stored as one word; a key of zero is a free
 * place. */
struct frontend {
	__be32 addr;
	__be16 port;
	__u8   protocol;
	__u8   used;           /* 1: there is a frontend here */
	__u32  service;        /* row of services */
	__u32  pad;
};

/* What becomes of an echo request to a VIP. */
enum ping {
	PING_DROP,
	PING_ANSWER,
	PING_FORWARD,        /* to an endpoint: the identifier stands for the client's port, and the VIP's is 0 */
};

/* Whether a name may be found, used and reused (xdp/naming.py). */
enum name_state {
	NAME_FREE,
	NAME_CLAIMED,          /* a writer is filling it */
	NAME_CANDIDATE,        /* its writer looks whether somebody else is naming the same address */
	NAME_ALIVE,
	NAME_DYING,            /* no flow was seen to use it; who wants to makes it alive again */
	NAME_WITHDRAWN,        /* not found any more: free after a grace period */
};

/* An IPv6 address. The number of its row, in network byte order, stands wherever an IPv4 address stands. Row 0 is nobody's. */
struct name {
	__u64 addr[2];         /* as in the header */
	__u32 sum;             /* one's complement sum of its 16-bit words, folded: differences need no addresses */
	__u32 state;           /* enum name_state; stored last, with release order */
	__u32 pins;            /* how often the control plane needs it, whatever flows do */
	__u32 pad;
};

/* IPv6 addresses from first to last, both included: the higher and the lower half, in host order. */
struct range6 {
	__u64 first[2];
	__u64 last[2];
};

/* What becomes of new connections while userspace is away: XDP admits them if it can, which drops them if it cannot. */
enum when_stalled { WHEN_STALLED_ADMIT, WHEN_STALLED_DROP, WHEN_STALLED_PASS };

/* What a Service port asks of admission beyond Maglev over its slots; with any of these, userspace is to admit. */
enum needs {
	NEEDS_RANGES = 1,      /* only clients in its source ranges may come: in none, if there is none */
	NEEDS_SNAT = 2,        /* source addresses may become the node's: see masquerade */
	NEEDS_SHORT_CUT = 4,   /* packets of clients inside the cluster are admitted by another row: see inside */
	NEEDS_AFFINITY = 8,    /* a client keeps its endpoint: see affinity_s */
	NEEDS_SCHEDULER = 16,  /* endpoints are not chosen by Maglev: see scheduler */
};

/* What becomes of a TCP segment without a flow that begins none. One that would be masqueraded cannot be adopted. */
enum mid_stream { MID_STREAM_ADOPT, MID_STREAM_PASS, MID_STREAM_RESET };

/* How an endpoint is chosen for a new connection. */
enum scheduler {
	SCHEDULER_MAGLEV,      /* by its five-tuple, alike on every node */
	SCHEDULER_RANDOM,      /* any, by its share of the slots */
	SCHEDULER_ROUND_ROBIN, /* one after the other: members or, where weights differ, slots */
	SCHEDULER_LEAST_CONNECTIONS, /* of two at random the one with the lower load */
};

/* Whose source address becomes the node's on the way to an endpoint. Whatever this says, an endpoint that reaches
 * itself through its Service is masqueraded: its kernel takes no packet from its own address. */
enum masquerade {
	MASQUERADE_NOBODY,
	MASQUERADE_OUTSIDE,    /* clients outside the cluster */
	MASQUERADE_REMOTE,     /* everybody, towards endpoints on other nodes */
	MASQUERADE_EVERYBODY,
};

/* A Service port. Immutable while a frontend holds its row; its slots are `slots` entries of the flat maglev array from first_slot on. */
struct service {
	__u32 first_slot;
	__u32 slots;           /* 0: no usable endpoint */
	__u8  when_stalled;
	__u8  admits_here;     /* 1: XDP admits even while userspace is there */
	__u8  is_elsewhere;    /* 1: it has no endpoint on this node, as its policy wants, but others have */
	__u8  needs;           /* enum needs, added up; 0: XDP may admit all but an endpoint that reaches itself */
	__u8  masquerade;      /* enum masquerade */
	__u8  mid_stream;      /* enum mid_stream */
	__u8  timeouts;        /* the set that its connections have, as in a flow's state: a multiple of 16 */
	__u8  pad;
	__u32 first_range;     /* its source ranges are `ranges` rows of the table from here on, ascending, disjoint */
	__u32 ranges;
	__u32 inside;          /* row that admits clients inside the cluster, sockets of this node among them; 0: this one */
	__u32 affinity_s;      /* a client that comes back within so many seconds has the same endpoint ... */
	__u32 identity;        /* ... at all rows of the Service port, which have this in common */
	__u32 members;         /* the candidates, ascending, each once, behind the slots; 0 where nobody asks for them */
	__u32 weights;         /* stands for the weights that the slots were shared out by; 0: equal ones */
	__u32 scheduler;       /* enum scheduler */
	__u32 turn;            /* of round robin: grows with every choice, the one field that packets write */
	__u8  pad2[12];
};

/* Sixteen slots: array maps round a row up to eight bytes. Userspace sees the flat array. */
struct maglev_line {
	__u32 endpoint[16];    /* row of endpoints */
};

/* Which endpoint a client was given last, written a word at a time. */
struct affinity {
	__u64 key;             /* keyed hash of the client's address and the Service port's identity; 0: empty, 1: claimed */
	__u32 endpoint;        /* row of endpoints */
	__u32 last_given;      /* jiffies, lower 32 bits */
};

/* Addresses from first to last, both included, in host order. */
struct range {
	__u32 first;
	__u32 last;
};

struct endpoint {
	__be32 addr;
	__be16 port;
	__u8   is_local;       /* 1: on this node */
	__u8   pad;
	__u32  next_hop;
	__u32  load;           /* for least connections: those open when last counted, and begun since */
};

enum hop_state {
	HOP_UNRESOLVED,        /* no route or no neighbour yet */
	HOP_FORWARD,           /* addresses and interface are known, and we may transmit there */
	HOP_FOREIGN,           /* resolved, but by an interface that is not ours */
	HOP_KERNEL,            /* the kernel routes what is for there: endpoints on this node */
};

/* Whose a row of next_hops is. XDP takes one by a compare-and-swap on its third word, from mtu to pad: 0 is free. */
enum row_use {
	ROW_FREE,
	ROW_OF_HOST,
	ROW_OF_ROUTES,         /* of all that lead the same way; destination and prefix_len are those of one of them */
	ROW_TAKEN,             /* XDP is filling it */
};

/* Where a packet goes next. The twelve address bytes lie as in the frame. */
struct next_hop {
	__u8  dst_mac[6];
	__u8  src_mac[6];
	__u32 ifindex;
	__u32 mtu;
	__u8  state;
	__u8  prefix_len;      /* of a host 32, of IPv6 128 */
	__u8  used;            /* enum row_use; row 0 is never handed out, and stays unresolved */
	__u8  pad;
	__be32 destination;    /* host or network that the row leads to: a successor resolves it anew */
	__be32 source;         /* the node's own address on the way there; 0: none */
};

/* A host that has a next hop of its own: one word, written whole. Where: hash of the address, or behind it; 0 is free. */
struct host {
	__u32 row;             /* of next_hops */
	__u32 address;         /* host order */
};

/* A datagram of a flow whose first fragment XDP has seen: where it lies its hash says, and the last one stays. */
struct datagram {
	__u64 addrs;           /* as in the header, or names */
	__u64 which;           /* protocol and identification */
	__u32 seen;            /* jiffies, lower 32 bits */
	__u32 pad[3];
};

/* The key of a route, as the kernel's longest-prefix match wants it. Its family comes first: no route covers the other. */
struct prefix {
	__u32 length;          /* PREFIX_FAMILY_BITS more than the network's */
	__u32 family;          /* 0 or PROTOCOL_IPV6 */
	__be32 network[4];     /* of IPv4 the first */
};

/* What a route leads to, unless to a row of next_hops. */
enum route_target { TARGET_NO_ROUTE = 0xfffffffe, TARGET_ON_LINK = 0xffffffff };

/* Words that everybody reads and hardly anybody writes. */
struct control {
	__u64 hash_key[2];     /* drawn when the table is created */
	__u32 hertz;           /* jiffies per second */
	__u32 aged_from;       /* no flow is idle since before this (jiffies): set by a takeover */
	__u32 stall_jiffies;
	__u32 next_hop_epoch;  /* grows with every change of a next hop, so that held frames are tried again */
	__u64 maglev_seed;     /* equal on every node that shares the VIPs; 0: slots are being made */
	__u64 answers_arp;     /* 1: questions for VIPs, by ARP and NDP, are answered */
	__u64 ping;            /* enum ping */
	__u8  pad[8];
	__u64 stations[STATIONS]; /* MAC addresses of ours, as in a frame; where there are fewer the first again, 0: all are */
	__u64 learned;         /* where XDP looks for a row to take for a client it has met; moves with every one taken */
	__u64 names;           /* rows of `names` that are not free */
	__u64 vlans[VLAN_WORDS]; /* by VLAN, a bit: 1: frames with its tag are served; bit 0: with a priority tag */
	__u8  pad2[48];
};

/* A packet loop. */
struct worker {
	__u64 heartbeat;       /* jiffies of its last turn, and bit 32; 0: no loop */
	__u64 turn;            /* odd while it may hold a record; another number after every turn */
	__u64 waiting_since;   /* jiffies of the first punt since its last turn, written by XDP; 0: nothing waits */
	__u8  pad[40];
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
	__u32 timeout[256];        /* jiffies, by a flow's state, set included; -1: over at once, and kept for as long as in STATE_ESTABLISHED */
};

/* The programs that a packet may be handed on to, by their places in the map `stages`. */
enum stage { STAGE_ADMIT, STAGE_SEND, STAGES };

/* What one XDP program hands to the next about a packet that may begin a connection. A row for each CPU. */
struct passage {
	__u64 addrs;           /* its five-tuple as parsed (hash.h): of an IPv6 client that may have no name yet ... */
	__u32 ports;
	__u32 protocol;
	__u32 slot;            /* the record of its connection's original, once there is one */
	__u32 l4;              /* offset of its transport header */
	__u32 event;
	__u32 service;         /* row of services */
	__u32 reader;          /* the worker that it could be punted to, or 2^32 - 1 ... */
	__u32 why;             /* ... and for which reason */
	__u32 now;
	__u32 vlan_bytes;      /* of its VLAN tags */
	__u32 pad[4];
};

/* A socket of this node and the endpoint that it was led to. Of IPv4 an address is mapped into IPv6 (RFC 4291 section 2.5.5.2). */
struct led {
	__u64 cookie;          /* the kernel's number of the socket, never given again */
	__u64 addr[2];         /* as in an IPv6 header */
	__be16 port;
	__u8  protocol;
	__u8  pad[5];          /* zero: part of a key */
};

/* What such a socket asked for, and is told that it has. */
struct vip {
	__u64 addr[2];         /* the same */
	__be16 port;
	__u8  pad[6];
};

/* A row of counters: XDP has one per CPU, userspace one per worker. */
struct counters {
	__u64 packets[MAX_REASONS];     /* [reason] */
	__u64 originated;               /* packets that nobody sent to us: refusals */
	__u8  pad[56];
};

/* What the tables were created with, as JSON: another layout or capacity is refused by name. */
struct layout {
	__u8 text[LAYOUT_BYTES];
};
