"""Connections: who stays with whom while Services change, and for how long. Ids are those of docs/behaviours.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.node import CONNECTIONS, ScenarioNode
from tests.packets import Address, ack, data, fin, reset_to, rewritten, rst, syn, syn_ack, tcp_with, udp
from tests.services import Service, text_of
from xdp.schema import Reason

WEB = Service("web", "10.96.0.1:80")
DNS = Service("dns", "10.96.0.10:53", protocol="UDP")
PORT = 8080
_moment = pytest.mark.engines("memory", why="only its clock can be moved")


def serve(node: ScenarioNode, service: Service, *hosts: str) -> Service:
    """Make a Service with endpoints on these hosts the only one."""
    service = node.of_family(service).with_endpoints(*(node.endpoint(host, PORT) for host in hosts))
    node.apply(service)
    return service


def open_connection(node: ScenarioNode, service: Service) -> tuple[Address, Address]:
    """Open a TCP connection; return client and endpoint."""
    client = node.client()
    host, _ = node.send(syn(client, service.at)).only
    endpoint = node.at(host, PORT)
    node.send(syn_ack(endpoint, client), host)
    assert node.send(ack(client, service.at)).only[0] == host
    assert node.flow(client)["state"] == "established"
    return client, endpoint


def goes_to(node: ScenarioNode, frame: bytes, client: Address, endpoint: Address) -> bool:
    """Send a frame of the client; return whether it arrives at this endpoint, whole."""
    host = node.host_of(endpoint)
    return node.send(frame).only == (host, rewritten(frame, client, endpoint, node.macs(host)))


def comes_back(node: ScenarioNode, frame: bytes, service: Service, client: Address, endpoint: Address) -> bool:
    """Send a frame of the endpoint; return whether it arrives at this client, whole, from the Service."""
    arrived = node.send(frame, node.host_of(endpoint)).only
    return arrived == ("client", rewritten(frame, service.at, client, node.macs("client")))


def test_C1_connections_keep_their_endpoint_when_another_is_added(node):
    service = serve(node, WEB, "web-1", "web-2")
    connections = [open_connection(node, service) for _ in range(8)]
    serve(node, WEB, "web-1", "web-2", "web-3")
    for client, endpoint in connections:
        assert goes_to(node, data(client, service.at), client, endpoint)
        assert comes_back(node, data(endpoint, client), service, client, endpoint)


def test_C1_datagrams_keep_their_endpoint_when_another_is_added(node):
    service = serve(node, DNS, "web-1", "web-2")
    clients = [node.client() for _ in range(8)]
    chosen = [node.send(udp(client, service.at)).only[0] for client in clients]
    serve(node, DNS, "web-1", "web-2", "web-3")
    for client, host in zip(clients, chosen, strict=True):
        assert goes_to(node, udp(client, service.at), client, node.at(host, PORT))


def test_C1_new_connections_are_given_to_an_endpoint_that_was_added(node):
    serve(node, WEB, "web-1")
    service = serve(node, WEB, "web-1", "web-2")
    assert {node.send(syn(node.client(), service.at)).only[0] for _ in range(20)} == {"web-1", "web-2"}


@pytest.mark.faults(60)
def test_C2_a_connection_from_its_first_packet_to_its_last(node):
    service, client = serve(node, WEB, "web-1"), node.client()
    endpoint = node.at("web-1", PORT)
    for frame, host, state in (
        (syn(client, service.at), "client", "syn_sent"),
        (syn(client, service.at), "client", "syn_sent"),  # sent again
        (syn_ack(endpoint, client), "web-1", "syn_received"),
        (ack(client, service.at), "client", "established"),
        (data(client, service.at), "client", "established"),
        (data(endpoint, client), "web-1", "established"),
        (fin(client, service.at), "client", "fin_original"),
        (data(endpoint, client), "web-1", "fin_original"),  # a FIN from one side keeps the other
        (fin(endpoint, client), "web-1", "time_wait"),
        (ack(client, service.at), "client", "time_wait"),
    ):
        if host == "client":
            assert goes_to(node, frame, client, endpoint)
        else:
            assert comes_back(node, frame, service, client, endpoint)
        assert node.flow(client)["state"] == state


def test_C2_the_endpoint_may_close_first(node):
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    assert comes_back(node, fin(endpoint, client), service, client, endpoint)
    assert node.flow(client)["state"] == "fin_reply"
    assert goes_to(node, fin(client, service.at), client, endpoint)
    assert node.flow(client)["state"] == "time_wait"


@pytest.mark.faults(61)
def test_C2_simultaneous_open(node):
    service, client = serve(node, WEB, "web-1"), node.client()
    endpoint = node.at("web-1", PORT)
    node.send(syn(client, service.at))
    assert comes_back(node, syn(endpoint, client), service, client, endpoint)
    assert node.flow(client)["state"] == "syn_received"


@pytest.mark.faults(56)
def test_C2_a_syn_on_a_closed_connection_begins_another(node):
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    node.send(fin(client, service.at))
    node.send(fin(endpoint, client), "web-1")
    sent = node.send(syn(client, service.at))
    assert (sent.only[0], sent.reason) == ("web-1", Reason.ADMITTED)
    flow = node.flow(client)
    assert (flow["state"], flow["packets"]) == ("syn_sent", {"original": 1, "reply": 0})
    assert comes_back(node, syn_ack(endpoint, client), service, client, endpoint)


def test_C2_a_syn_on_a_closed_connection_may_go_to_another_endpoint(node):
    service = serve(node, WEB, "web-1")
    client, _ = open_connection(node, service)
    node.send(rst(client, service.at))
    serve(node, WEB, "web-2")
    assert goes_to(node, syn(client, service.at), client, node.at("web-2", PORT))
    node.send(syn_ack(node.at("web-2", PORT), client), "web-2")
    assert goes_to(node, ack(client, service.at), client, node.at("web-2", PORT))


@pytest.mark.faults(56)
def test_C2_a_syn_on_an_open_connection_changes_nothing(node):
    service = serve(node, WEB, "web-1", "web-2")
    client, endpoint = open_connection(node, service)
    sent = node.send(syn(client, service.at))
    assert (sent.only[0], sent.reason) == (node.host_of(endpoint), Reason.FORWARDED)
    assert node.flow(client)["state"] == "established"


def test_C2_datagrams_are_replied_or_not(node):
    service, client = serve(node, DNS, "web-1"), node.client()
    endpoint = node.at("web-1", PORT)
    assert goes_to(node, udp(client, service.at), client, endpoint)
    assert node.flow(client)["state"] == "udp_unreplied"
    assert comes_back(node, udp(endpoint, client), service, client, endpoint)
    assert node.flow(client)["state"] == "udp_replied"


@pytest.mark.faults(59)
@pytest.mark.parametrize("blind", ["client", "endpoint"])
def test_C3_a_reset_shortens_a_connection_and_data_revives_it(node, blind):
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    if blind == "client":
        assert goes_to(node, rst(client, service.at), client, endpoint)
    else:
        assert comes_back(node, rst(endpoint, client), service, client, endpoint)
    flow = node.flow(client)
    assert flow["state"] == "closing"
    assert flow["expires_s"] <= 10
    assert goes_to(node, data(client, service.at), client, endpoint)
    assert 10 < node.flow(client)["expires_s"] <= 60
    assert comes_back(node, data(endpoint, client), service, client, endpoint)
    assert node.flow(client)["state"] == "established"


@_moment
@pytest.mark.faults(59)
@pytest.mark.parametrize("closed", ["nobody", "client", "endpoint"])
@pytest.mark.parametrize("dead", ["client", "endpoint"])
def test_C3_what_crosses_a_reset_keeps_no_connection_whose_ends_are_gone(node, dead, closed):
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    there, back = (client, service.at, "client"), (endpoint, client, "web-1")
    for source, destination, host in {"nobody": [], "client": [there], "endpoint": [back]}[closed]:
        node.send(fin(source, destination), host)
    one, other = (there, back) if dead == "client" else (back, there)
    node.send(rst(one[0], one[1]), one[2])
    for _ in range(2):
        assert node.send(ack(other[0], other[1]), other[2]).reason is Reason.FORWARDED
    assert node.flow(client)["expires_s"] == 60
    node.advance(61)
    node.sweep()
    assert node.flows(client=text_of(client)) == []


def test_C2_a_handshake_after_a_challenge_ACK_is_one_as_any_other(node):
    """The endpoint knows an older connection: it asks, the client resets that one, and tries again."""
    service, client = serve(node, WEB, "web-1"), node.client()
    endpoint = node.at("web-1", PORT)
    assert goes_to(node, syn(client, service.at), client, endpoint)
    assert comes_back(node, ack(endpoint, client), service, client, endpoint)
    assert goes_to(node, rst(client, service.at), client, endpoint)
    assert goes_to(node, syn(client, service.at), client, endpoint)
    assert comes_back(node, syn_ack(endpoint, client), service, client, endpoint)
    assert goes_to(node, ack(client, service.at), client, endpoint)
    assert node.flow(client)["state"] == "established"


@pytest.mark.faults(59)
def test_C3_a_reset_without_a_connection_is_dropped(node):
    service, client = serve(node, WEB, "web-1"), node.client()
    sent = node.send(rst(client, service.at))
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.STRAY_RST)
    assert node.flows(client=text_of(client)) == []


# Time.


@_moment
@pytest.mark.parametrize(
    ("state", "seconds"),
    [
        ("syn_sent", 60),
        ("syn_received", 60),
        ("established", 8000),
        ("fin_original", 8000),
        ("time_wait", 60),
        ("closing", 10),
        ("adopted", 60),
    ],
)
def test_C5_a_connection_lasts_for_the_timeout_of_its_state(node, state, seconds):
    service, client = serve(node, WEB, "web-1"), node.client()
    endpoint = node.at("web-1", PORT)
    road = [
        ("syn_sent", "client", syn(client, service.at)),
        ("syn_received", "web-1", syn_ack(endpoint, client)),
        ("established", "client", ack(client, service.at)),
        ("closing", "client", rst(client, service.at)),  # data revives it
        ("adopted", "client", data(client, service.at)),
        ("established", "web-1", data(endpoint, client)),
        ("fin_original", "client", fin(client, service.at)),
        ("time_wait", "web-1", fin(endpoint, client)),
    ]
    for reached, host, frame in road:
        node.send(frame, host)
        if reached == state:
            break
    flow = node.flow(client)
    assert (flow["state"], flow["expires_s"]) == (state, seconds)
    node.advance(seconds)
    node.sweep()
    assert node.flow(client)["expires_s"] == 0
    node.advance(0.1)
    node.sweep()
    assert node.flows(client=text_of(client)) == []


@_moment
@pytest.mark.parametrize(("is_replied", "seconds"), [(False, 30), (True, 120)])
def test_C5_every_datagram_refreshes_its_connection(node, is_replied, seconds):
    service, client = serve(node, DNS, "web-1"), node.client()
    node.send(udp(client, service.at))
    if is_replied:
        node.send(udp(node.at("web-1", PORT), client), "web-1")
    for _ in range(3):
        node.advance(seconds - 1)
        node.sweep()
        assert node.send(udp(client, service.at)).reason is Reason.FORWARDED
    node.advance(seconds + 1)
    assert node.send(udp(client, service.at)).reason is Reason.ADMITTED  # expired, though not yet swept


def test_C5_a_service_may_have_timeouts_of_its_own(node):
    quick, quicker = (
        replace(DNS, annotations={"turnout.dev/timeouts": f"udp-unreplied={seconds}s, udp=20s"}) for seconds in (9, 7)
    )
    other, first, second = (node.client() for _ in range(3))
    node.send(udp(other, serve(node, DNS, "web-1").at))
    node.send(udp(first, serve(node, quick, "web-1").at))
    assert 9 < node.flow(other)["expires_s"] <= 30
    assert 7 < node.flow(first)["expires_s"] <= 9
    node.send(udp(second, serve(node, quicker, "web-1").at))
    assert node.flow(second)["expires_s"] <= 7
    node.send(udp(node.at("web-1", PORT), first), "web-1")
    assert 9 < node.flow(first)["expires_s"] <= 20, "it has what it began with"


@pytest.mark.faults(63)
@_moment
def test_C5_either_direction_keeps_a_connection(node):
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    for _ in range(3):
        node.advance(7000)
        node.sweep()
        assert comes_back(node, data(endpoint, client), service, client, endpoint)
    assert goes_to(node, data(client, service.at), client, endpoint)


@_moment
def test_C5_a_client_that_begins_again_does_not_keep_a_connection_whose_endpoint_is_dead(node):
    """Its SYNs go to the endpoint, which would answer them if it knew of the connection, or of none."""
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    node.advance(7990)
    assert goes_to(node, syn(client, service.at), client, endpoint)
    assert node.flow(client)["expires_s"] == 10
    node.send(ack(endpoint, client), "web-1")  # it knows
    assert node.flow(client)["expires_s"] == 8000
    node.advance(7990)
    serve(node, WEB, "web-2")
    assert goes_to(node, syn(client, service.at), client, endpoint)
    node.advance(11)
    assert goes_to(node, syn(client, service.at), client, node.at("web-2", PORT))


@_moment
def test_C5_what_has_expired_is_no_connection_for_answers_either(node):
    service, client = serve(node, DNS, "web-1"), node.client()
    node.send(udp(client, service.at))
    node.advance(31)
    sent = node.send(udp(node.at("web-1", PORT), client), "web-1")
    assert (sent.left, sent.reason) == ([], Reason.NOT_OURS)


@_moment
def test_C5_what_has_expired_keeps_no_client_s_port_from_another_connection(node):
    """The endpoint gets the same from either VIP, so that a reply is one connection's only."""
    endpoint = node.endpoint("web-1", PORT)
    one, other = (Service(name, node.vip(number, 80), (endpoint,)) for number, name in ((1, "one"), (2, "other")))
    node.apply(one, other)
    client = node.client()
    assert goes_to(node, syn(client, one.at), client, node.at("web-1", PORT))
    node.advance(59)
    assert node.send(data(client, other.at)).reason is Reason.REPLY_CLASH
    node.advance(2)  # and nobody has swept
    assert goes_to(node, syn(client, other.at), client, node.at("web-1", PORT))
    assert comes_back(node, syn_ack(node.at("web-1", PORT), client), other, client, node.at("web-1", PORT))
    assert [flow["frontend"] for flow in node.flows(client=text_of(client))] == [text_of(other.at)]


@_moment
def test_C6_C7_a_flood_of_unreplied_datagrams_evicts_no_open_connection(node):
    service = Service("web", node.vip(1, 80), (node.endpoint("web-1", PORT),))
    flood = Service("dns", node.vip(10, 53), (node.endpoint("web-2", PORT),), "UDP")
    node.apply(service, flood)
    connections = [open_connection(node, service) for _ in range(50)]
    frame, at = udp(node.client("other"), flood.at), 34 if node.family == 4 else 54
    reasons: Counter[Reason] = Counter()
    for port in range(1, 2 * CONNECTIONS):
        reasons += node.send(frame[:at] + port.to_bytes(2, "big") + frame[at + 2 :], "other").reasons
    assert set(reasons) == {Reason.ADMITTED, Reason.TABLE_FULL}
    assert reasons[Reason.ADMITTED] > 0.9 * CONNECTIONS
    for client, endpoint in connections:
        assert goes_to(node, data(client, service.at), client, endpoint)
    node.advance(31)
    node.sweep()
    assert node.send(frame, "other").reason is Reason.ADMITTED


# Services that change.


def test_C8_connections_to_an_endpoint_that_is_removed_go_on(node):
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    serve(node, WEB, "web-2")
    assert goes_to(node, data(client, service.at), client, endpoint)
    assert comes_back(node, data(endpoint, client), service, client, endpoint)
    assert goes_to(node, syn(other := node.client(), service.at), other, node.at("web-2", PORT))


def test_C8_connections_to_an_endpoint_that_is_removed_may_be_reset(node):
    """Either side is answered as by a closed port, whenever it sends next; the client may begin anew at once."""
    impatient = replace(WEB, annotations={"turnout.dev/endpoint-removed": "reset"})
    service = serve(node, impatient, "web-1")
    client, endpoint = open_connection(node, service)
    serve(node, impatient, "web-2")
    assert node.flow(client)["state"] == "reset"
    for frame, host in ((data(client, service.at), "client"), (data(endpoint, client), "web-1")):
        for _ in range(2):
            sent = node.send(frame, host)
            expected = reset_to(node.on_the_wire(frame, host))
            assert (sent.only, sent.reason) == ((host, expected), Reason.ENDPOINT_REMOVED)
    for frame, host in ((rst(client, service.at), "client"), (rst(endpoint, client), "web-1")):
        sent = node.send(frame, host)
        assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.ENDPOINT_REMOVED)
    assert goes_to(node, syn(client, service.at), client, node.at("web-2", PORT))
    assert node.flow(client)["state"] == "syn_sent"


def test_C8_connections_to_endpoints_that_stay_are_not_reset(node):
    impatient = replace(node.of_family(WEB), annotations={"turnout.dev/endpoint-removed": "reset"})
    patient = Service("patient", node.vip(2, 80))
    web_1, web_2 = node.endpoint("web-1", PORT), node.endpoint("web-2", PORT)
    node.apply(impatient.with_endpoints(web_1, web_2), patient.with_endpoints(web_1))
    opened = [open_connection(node, impatient) for _ in range(8)]
    other, its_endpoint = open_connection(node, patient)
    node.apply(impatient.with_endpoints(web_2), patient.with_endpoints(web_2))
    gone = node.at("web-1", PORT)
    for client, endpoint in opened:
        assert (node.flow(client)["state"] == "reset") == (endpoint == gone)
    for client, endpoint in opened:
        if endpoint != gone:
            assert goes_to(node, data(client, impatient.at), client, endpoint)
    assert goes_to(node, data(other, patient.at), other, its_endpoint)


@pytest.mark.faults(71)
def test_C8_datagrams_to_an_endpoint_that_is_removed_move(node):
    service, client = serve(node, DNS, "web-1"), node.client()
    node.send(udp(client, service.at))
    node.send(udp(node.at("web-1", PORT), client), "web-1")
    serve(node, DNS, "web-2")
    endpoint = node.at("web-2", PORT)
    assert goes_to(node, udp(client, service.at), client, endpoint)
    assert comes_back(node, udp(endpoint, client), service, client, endpoint)


def test_C8_datagrams_to_endpoints_that_stay_do_not_move(node):
    service = serve(node, DNS, "web-1", "web-2", "web-3")
    clients = [node.client() for _ in range(12)]
    chosen = {client: node.send(udp(client, service.at)).only[0] for client in clients}
    serve(node, DNS, "web-1", "web-2")
    for client, host in chosen.items():
        if host != "web-3":
            assert goes_to(node, udp(client, service.at), client, node.at(host, PORT))
        else:
            assert node.send(udp(client, service.at)).only[0] in ("web-1", "web-2")


def test_C8_datagrams_move_when_only_their_own_service_has_lost_the_endpoint(node):
    web_1, web_2 = node.endpoint("web-1", PORT), node.endpoint("web-2", PORT)
    keeps = Service("keeps", node.vip(11, 53), (web_1,), "UDP")
    loses = node.of_family(DNS).with_endpoints(web_1)
    node.apply(keeps, loses)
    clients = [node.client() for _ in range(2)]
    for client, service in zip(clients, (keeps, loses), strict=True):
        assert node.send(udp(client, service.at)).only[0] == "web-1"
    node.apply(keeps, loses.with_endpoints(web_2))
    assert goes_to(node, udp(clients[0], keeps.at), clients[0], node.at("web-1", PORT))
    assert node.send(udp(clients[1], loses.at)).only[0] == "web-2"


def test_C8_datagrams_stay_while_their_endpoint_serves_and_move_when_it_ends(node):
    """As a pod goes: it terminates and still serves, it serves no more, it is gone."""
    web_1, web_2 = node.endpoint("web-1", PORT), node.endpoint("web-2", PORT)
    ready = node.of_family(DNS).with_endpoints(web_1)
    client = node.client()
    node.apply(ready)
    node.send(udp(client, ready.at))
    for is_serving, host in ((True, "web-1"), (False, "web-2")):
        conditions = {"ready": False, "serving": is_serving, "terminating": True}
        node.apply(replace(ready, endpoints=(web_1, web_2), about={web_1: {"conditions": conditions}}))
        assert node.send(udp(client, ready.at)).only[0] == host


@pytest.mark.faults(128)
def test_C9_an_endpoint_that_comes_back_serves_again(node):
    service = serve(node, DNS, "web-1")
    before = node.client()
    node.send(udp(before, service.at))
    serve(node, DNS, "web-2")
    service = serve(node, DNS, "web-1")
    assert goes_to(node, udp(before, service.at), before, node.at("web-1", PORT))


def pod(node: ScenarioNode, service: Service, uid: str, host: str = "web-1") -> Service:
    """Return a Service with one endpoint, behind which is this Pod."""
    place = node.endpoint(host, PORT)
    about = {place: {"targetRef": {"kind": "Pod", "uid": uid}}}
    return replace(node.of_family(service), endpoints=(place,), about=about)


@pytest.mark.faults(128)
@pytest.mark.parametrize("is_seen_to_go", [False, True], ids=["at-once", "later"])
def test_C9_a_pod_that_has_the_address_of_another_gets_none_of_its_connections(node, is_seen_to_go):
    first, second = pod(node, WEB, "first"), pod(node, replace(WEB, name="other", frontend="10.96.0.2:80"), "second")
    node.apply(first)
    client, endpoint = open_connection(node, first)
    if is_seen_to_go:
        node.apply(first.with_endpoints())
    node.apply(second)
    segment = data(client, first.at)
    sent = node.send(segment)
    assert sent.reason is Reason.ENDPOINT_REMOVED
    assert sent.only == ("client", reset_to(node.on_the_wire(segment, "client")))
    assert node.send(data(endpoint, client), "web-1").reason is Reason.ENDPOINT_REMOVED
    assert open_connection(node, second)[1] == endpoint


def test_C9_the_pod_that_was_there_before_has_its_connections_still(node):
    service = pod(node, WEB, "first")
    node.apply(service)
    client, endpoint = open_connection(node, service)
    node.apply(service.with_endpoints())
    node.apply(service)
    assert goes_to(node, data(client, service.at), client, endpoint)
    unnamed = replace(service, about={})
    node.apply(unnamed)
    node.apply(pod(node, WEB, "first"))
    assert goes_to(node, data(client, service.at), client, endpoint)


def test_C9_datagrams_to_the_pod_before_begin_anew(node):
    service = pod(node, DNS, "first")
    node.apply(service)
    client = node.client()
    node.send(udp(client, service.at))
    node.apply(pod(node, DNS, "second"))
    assert node.send(udp(client, service.at)).reason is Reason.ADMITTED


def test_C10_connections_of_a_deleted_service_end_by_themselves_and_leak_nowhere(node):
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    other = Service("other", node.vip(2, 80), (node.endpoint("web-2", PORT),))
    node.apply(other)
    assert goes_to(node, data(client, service.at), client, endpoint)
    assert comes_back(node, data(endpoint, client), service, client, endpoint)
    sent = node.send(syn(node.client(), service.at))
    assert (sent.left, sent.reason) == ([], Reason.NOT_OURS)


@pytest.mark.faults(71)
def test_C10_datagrams_of_a_deleted_service_are_nobodys(node):
    service, client = serve(node, DNS, "web-1"), node.client()
    node.send(udp(client, service.at))
    node.apply(Service("other", node.vip(2, 53), (node.endpoint("web-2", PORT),), "UDP"))
    sent = node.send(udp(client, service.at))
    assert (sent.left, sent.reason) == ([], Reason.NOT_OURS)
    assert node.flows(client=text_of(client)) == []


@pytest.mark.faults(116)
def test_C10_a_service_that_takes_over_the_address_gets_new_connections_only(node):
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    node.apply(Service("heir", service.frontend, (node.endpoint("web-2", PORT),)))
    assert goes_to(node, data(client, service.at), client, endpoint)
    assert node.send(syn(node.client(), service.at)).only[0] == "web-2"


# Packets of unknown connections.


@pytest.mark.faults(58)
@pytest.mark.parametrize("frame", [ack, data])
def test_C11_a_packet_from_the_middle_of_a_connection_is_adopted(node, frame):
    service, client = serve(node, WEB, "web-1", "web-2", "web-3"), node.client()
    host, _ = node.send(frame(client, service.at)).only
    endpoint = node.at(host, PORT)
    assert node.flow(client)["state"] == "adopted"
    assert comes_back(node, data(endpoint, client), service, client, endpoint)
    assert node.flow(client)["state"] == "established"
    assert goes_to(node, data(client, service.at), client, endpoint)


@pytest.mark.parametrize("asks", [False, True])
def test_C11_a_connection_met_at_its_last_packets_is_closed_by_them(node, asks):
    service, client = serve(node, WEB, "web-1", "web-2", "web-3"), node.client()
    host, _ = node.send(fin(client, service.at)).only
    endpoint = node.at(host, PORT)
    assert node.flow(client)["state"] == "adopted_fin"
    if asks:
        assert comes_back(node, ack(endpoint, client), service, client, endpoint)
        assert node.flow(client)["state"] == "fin_original"
    assert comes_back(node, fin(endpoint, client), service, client, endpoint)
    assert goes_to(node, ack(client, service.at), client, endpoint)
    assert node.flow(client)["state"] == "time_wait"


@_moment
def test_C11_a_connection_that_was_forgotten_is_adopted_by_its_endpoint(node):
    service = serve(node, WEB, "web-1", "web-2", "web-3")
    connections = [open_connection(node, service) for _ in range(20)]
    node.advance(8001)
    node.sweep()
    assert node.flows() == []
    for client, endpoint in connections:
        assert goes_to(node, data(client, service.at), client, endpoint)


@pytest.mark.engines("memory", "xdp", "xdp-generic", "afxdp", why="with raw the kernel does not get what is for a VIP")
@pytest.mark.parametrize("admit", ["userspace", "xdp"])
@pytest.mark.parametrize("frame", [ack, data, fin, syn_ack])
def test_C11_a_packet_from_the_middle_of_a_connection_may_be_passed(node, frame, admit):
    service, client = serve(node, _with_option(WEB, "pass", admit), "web-1"), node.client()
    sent = node.send(frame(client, service.at))
    expected = node.on_the_wire(frame(client, service.at), "client")
    assert (sent.left, sent.passed, sent.reason) == ([], [expected], Reason.MID_STREAM_PASSED)
    assert node.flows(client=text_of(client)) == []
    client, endpoint = open_connection(node, service)
    assert goes_to(node, data(client, service.at), client, endpoint)


@pytest.mark.parametrize("admit", ["userspace", "xdp"])
@pytest.mark.parametrize("frame", [ack, data, fin, syn_ack])
def test_C11_a_packet_from_the_middle_of_a_connection_may_be_reset(node, frame, admit):
    service, client = serve(node, _with_option(WEB, "reset", admit), "web-1"), node.client()
    sent = node.send(frame(client, service.at))
    expected = reset_to(node.on_the_wire(frame(client, service.at), "client"))
    assert (sent.only, sent.reason) == (("client", expected), Reason.MID_STREAM_RESET)
    assert node.flows(client=text_of(client)) == []
    client, endpoint = open_connection(node, service)
    assert goes_to(node, data(client, service.at), client, endpoint)


def test_C11_datagrams_have_no_middle(node):
    service, client = serve(node, _with_option(DNS, "reset"), "web-1"), node.client()
    assert node.send(udp(client, service.at)).reason is Reason.ADMITTED


def _with_option(service: Service, mid_stream: str, admit: str = "userspace") -> Service:
    options = {"turnout.dev/mid-stream": mid_stream, "turnout.dev/admit": admit}
    return replace(service, annotations=options)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("", id="null"),
        pytest.param("FPU", id="xmas"),
        pytest.param("SF", id="syn-fin"),
        pytest.param("SR", id="syn-rst"),
        pytest.param("F", id="fin-alone"),
        pytest.param("SAFR", id="all"),
    ],
)
def test_C13_flags_that_no_stack_sends_create_no_state(node, flags):
    service, client = serve(node, WEB, "web-1"), node.client()
    sent = node.send(tcp_with(flags, client, service.at))
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.BAD_FLAGS)
    assert node.flows(client=text_of(client)) == []


def test_C13_flags_that_no_stack_sends_change_no_state(node):
    service = serve(node, WEB, "web-1")
    client, endpoint = open_connection(node, service)
    for flags in ("", "FPU", "SF", "SR"):
        assert goes_to(node, tcp_with(flags, client, service.at), client, endpoint)
        assert node.flow(client)["state"] == "established"


def test_the_status_counts_connections(node):
    service = serve(node, WEB, "web-1")
    before = node.status()["flows"]["used"]
    for _ in range(3):
        node.send(syn(node.client(), service.at))
    assert node.status()["flows"]["used"] - before in (2, 3)  # one of before may have expired meanwhile
