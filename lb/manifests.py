"""Manifests -> the Service model: what `kubectl get svc,endpointslices -o yaml` prints, validated whole.

Every problem is found before anything is said, and each has its place. The reading takes three steps: files to plain
documents (lb/documents.py), documents to objects that hold only known fields (lb/fields.py), objects to the model,
which are then looked at together (two Services at one address, an endpoint that is a VIP).
"""

from __future__ import annotations

import os
import stat
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from lb import documents, fields
from lb.annotations import read_options
from lb.catalog import Catalog
from lb.documents import TextError, dotted
from lb.errors import ManifestError, Problem
from lb.fields import did_you_mean, read_address, read_network, shown, special
from lb.garbage import no_collections
from lb.live import Changes
from lb.model import (
    DEFAULT_AFFINITY_S,
    DEFAULT_OPTIONS,
    EndpointSlice,
    EndpointState,
    Ingress,
    PortSpec,
    Service,
    SliceEndpoint,
    SlicePort,
    claims,
    vips,
)

_SUFFIXES = (".yaml", ".yml", ".json")
_STDIN = "<stdin>"
_LARGEST_FILE = 1 << 30  # bytes
_TOO_LARGE = f"is larger than {_LARGEST_FILE >> 20} MiB; split it"
_NOT_REGULAR = "is no regular file; a pipe can be given by its name with -f, and from the start"
_DEEPEST_LIST = 20  # Lists in Lists
_EMPTIED = (
    "is empty now, and was not; to take away all that it had, write `{kind: List, items: []}`, "
    "or delete it from the folder that is given"
)
_SERVICE_NAME = "kubernetes.io/service-name"
_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
_HEADLESS = "service.kubernetes.io/headless"
_VERSIONS = {"Service": "v1", "EndpointSlice": "discovery.k8s.io/v1"}
_LISTS = {"List": None, "ServiceList": "Service", "EndpointSliceList": "EndpointSlice"}
_INSTEAD = {"Endpoints": "; use an EndpointSlice"}


@dataclass(frozen=True, slots=True)
class Manifests:
    """What the files say."""

    services: tuple[Service, ...]
    slices: tuple[EndpointSlice, ...]
    files: tuple[Path, ...]  # that were read
    folders: tuple[Path, ...]  # that were listed; with `files`, what to watch for changes
    origins: tuple[_Origin, ...] = field(compare=False, repr=False)  # of the Services, then of the slices

    def place(self, notes: Iterable[tuple[str, documents.Path, str]], once: Once) -> list[Problem]:
        """Return notes of objects ("Service shop/web"), each a path in one and a message, with their lines."""
        names = [f"Service {each.namespace}/{each.name}" for each in self.services]
        names += [f"EndpointSlice {each.namespace}/{each.name}" for each in self.slices]
        origins = dict(zip(names, self.origins, strict=True))
        return _placed([_Found(origins[name], path, message) for name, path, message in notes], once)


class _Origin(NamedTuple):
    """Where an object stands."""

    file: str
    path: documents.Path
    name: str  # "Service shop/web"


class _Found(NamedTuple):
    """A problem before its line is known. Of a text that cannot be read, `line` is all that there is."""

    origin: _Origin
    path: documents.Path
    message: str
    line: int = 0


@dataclass(slots=True)
class _File:
    """What one file holds. It is empty without a document, as one is whose writer has only just begun."""

    services: list[tuple[Service, _Origin]] = field(default_factory=list)
    slices: list[tuple[EndpointSlice, _Origin]] = field(default_factory=list)
    problems: list[_Found] = field(default_factory=list)
    is_empty: bool = False


Cache = dict[Path, tuple[tuple[int, ...], _File]]
Once = dict[str, bytes]  # by name, what cannot be read a second time: stdin and other pipes


def is_manifest(name: str) -> bool:
    """Tell whether a file of that name is read when its folder is given."""
    return name.endswith(_SUFFIXES) and not name.startswith(".")


class Reader:
    """Reads manifests again and again: `load` everything that changed, `reload` what is known to have changed."""

    def __init__(self, paths: Sequence[str], stdin: IO[bytes] | None = None) -> None:
        self._paths = paths
        self._stdin = stdin
        self._cache: Cache = {}
        self._once: Once = {}
        self._catalog: Catalog | None = None
        self._is_whole = False  # what was read last was right, and the cache has all of it

    def load(self) -> Manifests:
        """Return what the manifests say now; raise ManifestError as the function `load` does."""
        self._catalog, self._is_whole = None, False
        found = load(self._paths, self._stdin, self._cache, self._once)
        self._is_whole = len(self._cache) == len(found.files) and not self._once
        return found

    def reload(self, names: Collection[str]) -> Changes | None:
        """Read these files of given folders again; return what they change, or None if only `load` can tell.

        That is when something is wrong with them, with what was read before, or with how they fit together.
        """
        if not self._is_whole:
            return None
        if self._catalog is None:
            self._catalog = Catalog(*_contents(file for _, file in self._cache.values()))
        self._is_whole = False
        old: list[_File] = []
        new: list[_File] = []
        for name in names:
            path = Path(name)
            _, before = self._cache.get(path, ((), _File()))
            now = _read_file(path, self._cache)
            if now.problems and not path.exists():
                self._cache.pop(path, None)
                now = _File()
            if now.problems:
                return None
            if now is not before:
                old.append(before)
                new.append(now)
        left, come = _contents(old), _contents(new)
        if not self._catalog.replace(left, come):
            return None
        self._is_whole = True
        services: dict[tuple[str, str], Service | None] = {(each.namespace, each.name): None for each in left[0]}
        slices: dict[tuple[str, str], EndpointSlice | None] = {(each.namespace, each.name): None for each in left[1]}
        services.update({(each.namespace, each.name): each for each in come[0]})
        slices.update({(each.namespace, each.name): each for each in come[1]})
        return Changes(services, slices)


def _contents(files: Iterable[_File]) -> tuple[list[Service], list[EndpointSlice]]:
    """Return all objects of `files`."""
    services: list[Service] = []
    slices: list[EndpointSlice] = []
    for file in files:
        services += [service for service, _ in file.services]
        slices += [part for part, _ in file.slices]
    return services, slices


def load(
    paths: Sequence[str], stdin: IO[bytes] | None = None, cache: Cache | None = None, once: Once | None = None
) -> Manifests:
    """Return what the manifests in `paths` say; raise ManifestError with everything that is wrong with them.

    A path is a file, a folder (its *.yaml, *.yml and *.json, hidden ones skipped) or `-` for `stdin` (sys.stdin's
    bytes unless given). What is no regular file has to be given by name, and is waited for.

    With a `cache`, a dict that the caller keeps, files that have not changed since the last call are not read again,
    and one that has lost every document is refused: its writer has not written it yet, or failed. With `once`, another
    such dict, what cannot be read again is remembered.
    """
    with no_collections():
        return _load(paths, stdin, {} if cache is None else cache, {} if once is None else once)


def _load(paths: Sequence[str], stdin: IO[bytes] | None, cache: Cache, once: Once) -> Manifests:
    problems: list[_Found] = []
    names, folders = _expand(paths, problems)
    files: list[_File] = []
    for name in names:
        if name == "-":
            if _STDIN not in once:
                once[_STDIN] = (stdin or sys.stdin.buffer).read(_LARGEST_FILE + 1)
            files.append(_read_bytes(_STDIN, once[_STDIN]))
        elif name in once and not Path(name).is_file():
            files.append(_read_bytes(name, once[name]))
        else:
            once.pop(name, None)
            files.append(_read_file(Path(name), cache, once if name in paths else None))
    for gone in cache.keys() - set(map(Path, names)):
        del cache[gone]
    for file in files:
        problems += file.problems
    services = [pair for file in files for pair in file.services]
    slices = [pair for file in files for pair in file.slices]
    problems += _conflicts(services, slices)
    if problems:
        raise ManifestError(_placed(problems, once))
    return Manifests(
        tuple([service for service, _ in services]),
        tuple([part for part, _ in slices]),
        tuple([Path(name) for name in names if name != "-"]),
        folders,
        tuple([origin for _, origin in [*services, *slices]]),
    )


# Files.


def _expand(paths: Sequence[str], problems: list[_Found]) -> tuple[list[str], tuple[Path, ...]]:
    """Return the files behind `paths`, each once and in order, and the folders among them."""
    names: dict[str, None] = {}
    folders: list[Path] = []
    for given in paths:
        if given != "-" and os.path.isdir(given):
            folders.append(Path(given))
            try:
                with os.scandir(given) as entries:  # a link may lead to a file, a pipe would block for good
                    inside = sorted(entry.name for entry in entries if entry.is_file() or entry.is_symlink())
            except OSError as error:
                problems.append(_of_file(given, f"cannot be listed: {error.strerror}"))
                continue
            for name in inside:
                if is_manifest(name):
                    names[os.path.join(given, name)] = None
        else:
            names[given] = None
    return list(names), tuple(folders)


def _of_file(name: str, message: str, line: int = 0) -> _Found:
    return _Found(_Origin(name, (), ""), (), message, line)


def _read_file(path: Path, cache: Cache, once: Once | None = None) -> _File:
    """Return what the file at `path` holds, from `cache` if it has not changed.

    Who opens a pipe may wait for ever. So one is read only with `once`, where its bytes are left, and not in the place
    of a regular file.
    """
    name = str(path)
    known = cache.get(path)
    may_wait = once is not None and known is None
    try:
        with open(path, "rb", opener=None if may_wait else _open_at_once) as stream:
            status = os.fstat(stream.fileno())
            is_regular = stat.S_ISREG(status.st_mode)
            signature = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if known is not None and known[0] == signature:
                return known[1]
            if status.st_size > _LARGEST_FILE:
                return _File(problems=[_of_file(name, _TOO_LARGE)])
            if not is_regular and not may_wait:
                return _File(problems=[_of_file(name, _NOT_REGULAR)])
            data = stream.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        return _File(problems=[_of_file(name, "no such file or folder; check the path given with -f")])
    except OSError as error:
        return _File(problems=[_of_file(name, f"cannot be read: {error.strerror}")])
    if once is not None and not is_regular:
        once[name] = data
    file = _read_bytes(name, data)
    if file.is_empty and known is not None and (known[1].services or known[1].slices):
        return _File(problems=[_of_file(name, _EMPTIED)])
    if is_regular and not file.problems:
        cache[path] = signature, file
    return file


def _open_at_once(name: str, flags: int) -> int:
    """Open a file, and do not wait for the other end of a pipe."""
    return os.open(name, flags | os.O_NONBLOCK)


def _read_bytes(name: str, data: bytes) -> _File:
    """Return what `data` holds."""
    if len(data) > _LARGEST_FILE:
        return _File(problems=[_of_file(name, _TOO_LARGE)])
    try:
        parsed = documents.parse(documents.decode(data), name.endswith(".json"))
    except TextError as problem:
        return _File(problems=[_of_file(name, problem.message, problem.line)])
    file = _File(is_empty=all(root is None for root in parsed.roots))
    for path, line in parsed.duplicates:
        origin = _enclosing(name, parsed.roots, path)
        file.problems.append(_Found(origin, path[len(origin.path) :], "comes twice; remove one", line))
    for number, root in enumerate(parsed.roots):
        if root is not None:
            _read_object(file, root, _Origin(name, (number,), ""), None, 0)
    return file


def _enclosing(name: str, roots: list[Any], path: documents.Path) -> _Origin:
    """Return the innermost object that `path` leads through.

    It may end early: of a key that comes twice, what the first value held is no more.
    """
    origin = _Origin(name, path[:1], "")
    value: Any = roots
    for length, step in enumerate(path, 1):
        try:
            value = value[step]
        except (LookupError, TypeError):
            break
        kind = value.get("kind") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind in _VERSIONS and "metadata" in value:
            origin = _Origin(name, path[:length], _title(value, kind))
    return origin


def _placed(problems: Sequence[_Found], once: Once) -> list[Problem]:
    """Return the problems with their lines, in order of file and line."""
    order = {name: position for position, name in enumerate(dict.fromkeys(found.origin.file for found in problems))}
    by_file: dict[str, list[_Found]] = defaultdict(list)
    for found in problems:
        by_file[found.origin.file].append(found)
    placed: list[Problem] = []
    for name, of_file in by_file.items():
        paths = {found.origin.path + found.path for found in of_file if not found.line and found.origin.path}
        lines = documents.find_lines(_text_again(name, once), paths) if paths else {}
        for found in of_file:
            line = found.line or lines.get(found.origin.path + found.path, 0)
            placed.append(Problem(_printable(name), line, found.origin.name, dotted(found.path), found.message))
    positions = {_printable(name): position for name, position in order.items()}
    return sorted(dict.fromkeys(placed), key=lambda problem: (positions[problem.file], problem.line))


def _text_again(name: str, once: Once) -> str:
    try:
        return documents.decode(once[name] if name in once else Path(name).read_bytes())
    except (OSError, TextError):
        return ""  # changed in the meantime: problems without lines


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)[1:-1]


# Objects.


def _title(value: dict[str, Any], kind: str) -> str:
    """Return how messages call an object: "Service shop/web"."""
    metadata = value.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name, namespace = metadata.get("name"), metadata.get("namespace") or "default"
    if not isinstance(name, str) or not name:
        return f"{kind} (no name)"
    return _printable(f"{kind} {namespace}/{name}")[:300]


def _read_object(file: _File, value: Any, origin: _Origin, implied: str | None, depth: int) -> None:
    """Add the object or objects in `value` to `file`; `implied` is the kind of a list's items that do not say."""

    def report(path: documents.Path, message: str) -> None:
        file.problems.append(_Found(origin, path, message))

    if not isinstance(value, dict):
        report((), f"{shown(value)} is not an object; expected a mapping with apiVersion, kind and metadata")
        return
    kind = value.get("kind") or implied
    if kind is None:
        report((), "kind is missing; expected Service, EndpointSlice or List")
        return
    if not isinstance(kind, str) or (kind not in _VERSIONS and kind not in _LISTS):
        cure = _INSTEAD.get(str(kind)) or did_you_mean(kind, (*_VERSIONS, "List"))
        report(("kind",), f"{shown(kind)} is not a kind that is read here{cure}")
        return
    if kind in _LISTS:
        _read_list(file, value, origin, kind, depth, report)
        return
    origin = origin._replace(name=_title(value, kind))
    version = value.get("apiVersion") or (_VERSIONS[kind] if implied else None)
    if version != _VERSIONS[kind]:
        report(("apiVersion",), f"{shown(version) if version else 'missing'}; expected {shown(_VERSIONS[kind])}")
    before = len(file.problems)
    fields.check(value, fields.SERVICE if kind == "Service" else fields.ENDPOINT_SLICE, (), report)
    metadata = value.get("metadata")
    if isinstance(metadata, dict) and not metadata.get("name"):
        report(("metadata",), "name is missing")
    elif metadata is None:
        report((), "metadata is missing")
    if kind == "Service" and isinstance(metadata, dict) and isinstance(metadata.get("annotations"), dict):
        read_options(metadata["annotations"], report)
    if len(file.problems) > before:
        return
    if kind == "Service":
        file.services.append((_service(value, report), origin))
    else:
        file.slices.append((_slice(value, report), origin))


def _read_list(
    file: _File, value: dict[str, Any], origin: _Origin, kind: str, depth: int, report: fields.Report
) -> None:
    if depth >= _DEEPEST_LIST:
        report((), f"a List is nested more than {_DEEPEST_LIST} levels deep")
        return
    fields.check(value, {"apiVersion": str, "kind": str, "metadata": fields.LIST_METADATA, "items": object}, (), report)
    items = value.get("items")
    if items is not None and not isinstance(items, list):
        report(("items",), f"{shown(items)} is not a list")
        return
    for index, item in enumerate(items or ()):
        _read_object(file, item, origin._replace(path=(*origin.path, "items", index)), _LISTS[kind], depth + 1)


def _service(value: dict[str, Any], report: fields.Report) -> Service:
    """Return the Service that `value` is; its fields have been checked one by one, here it is how they fit together."""
    metadata = value["metadata"]
    spec = value.get("spec") or {}
    status = value.get("status") or {}
    kind = spec.get("type") or "ClusterIP"
    if kind != "ExternalName" and not spec.get("ports") and spec.get("clusterIP") != "None":
        report(("spec",) if "spec" in value else (), "ports is missing; a Service has at least one")
    ports = _ports(spec.get("ports") or (), report)
    cluster_ips = _cluster_ips(spec, report)
    external_ips = tuple([_known(text) for text in spec.get("externalIPs") or ()])
    config = ((spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}).get("timeoutSeconds")
    annotations = metadata.get("annotations")
    return Service(
        metadata.get("namespace") or "default",
        metadata["name"],
        kind,
        cluster_ips,
        spec.get("clusterIP") == "None" or spec.get("clusterIPs") == ["None"],
        ports,
        external_ips,
        _ingress(status),
        tuple([read_network(text) for text in spec.get("loadBalancerSourceRanges") or ()]),  # type: ignore[misc]
        spec.get("externalTrafficPolicy") or "Cluster",
        spec.get("internalTrafficPolicy") or "Cluster",
        spec.get("healthCheckNodePort") or 0,
        (config or DEFAULT_AFFINITY_S) if spec.get("sessionAffinity") == "ClientIP" else 0,
        (metadata.get("labels") or {}).get(_PROXY_NAME),
        read_options(annotations, report) if annotations else DEFAULT_OPTIONS,
        metadata.get("uid") or "",
        metadata.get("creationTimestamp") or "",
    )


def _known(text: str) -> Any:
    """Return the address that `text` is; it has been checked."""
    return read_address(text)


def _ports(written: Sequence[Any], report: fields.Report) -> tuple[PortSpec, ...]:
    ports: list[PortSpec] = []
    names: set[str] = set()
    numbers: set[tuple[int, str]] = set()
    for index, port in enumerate(written):
        path = ("spec", "ports", index)
        if port.get("port") is None:
            report(path, "port is missing")
            continue
        name, number, protocol = port.get("name") or "", port["port"], port.get("protocol") or "TCP"
        if not name and len(written) > 1:
            report(path, "name is missing; each port needs one when there are several")
        elif name in names:
            report((*path, "name"), f"{shown(name)} is the name of another port, too")
        if (number, protocol) in numbers:
            report((*path, "port"), f"{number} with protocol {protocol} comes twice")
        names.add(name)
        numbers.add((number, protocol))
        ports.append(PortSpec(name, number, protocol, port.get("nodePort") or 0))
    return tuple(ports)


def _cluster_ips(spec: dict[str, Any], report: fields.Report) -> tuple[Any, ...]:
    first = spec.get("clusterIP") or ""
    every = [text for text in spec.get("clusterIPs") or () if text]
    if every and first and every[0] != first:
        report(("spec", "clusterIPs", 0), f"{shown(every[0])} differs from spec.clusterIP {shown(first)}")
    addresses = tuple([_known(text) for text in every or ((first,) if first else ()) if text != "None"])
    if len(addresses) > 2 or (len(addresses) == 2 and addresses[0].version == addresses[1].version):
        report(
            ("spec", "clusterIPs"), "more than one address of a family; expected at most one IPv4 and one IPv6 address"
        )
    return addresses


def _ingress(status: dict[str, Any]) -> tuple[Ingress, ...]:
    """Return the addresses that are captured: those that are not in mode Proxy and not host names (S6)."""
    written = (status.get("loadBalancer") or {}).get("ingress") or ()
    found: list[Ingress] = []
    for index, entry in enumerate(written):
        if entry.get("ip") and entry.get("ipMode") != "Proxy":
            found.append(Ingress(_known(entry["ip"]), index))
    return tuple(found)


def _slice(value: dict[str, Any], report: fields.Report) -> EndpointSlice:
    """Return the EndpointSlice that `value` is, whose fields have been checked one by one."""
    metadata = value["metadata"]
    labels = metadata.get("labels") or {}
    address_type = value.get("addressType")
    if address_type is None:
        report((), "addressType is missing; expected IPv4 or IPv6")
    endpoints: list[SliceEndpoint] = []
    for index, written in enumerate(value.get("endpoints") or ()):
        address = _endpoint_address(written, address_type, ("endpoints", index), report)
        if address is not None:
            endpoints.append(_endpoint(written, address))
    ports = [
        SlicePort(port.get("name"), port.get("port"), port.get("protocol") or "TCP")
        for port in value.get("ports") or ()
    ]
    return EndpointSlice(
        metadata.get("namespace") or "default",
        metadata["name"],
        labels.get(_SERVICE_NAME),
        address_type or "",
        tuple(ports),
        tuple(endpoints),
        _HEADLESS in labels,
        labels.get(_PROXY_NAME),
    )


def _endpoint_address(
    written: dict[str, Any], address_type: str | None, path: documents.Path, report: fields.Report
) -> Any:
    """Return the first address of an endpoint (E3), or None; report all that cannot be."""
    texts = written.get("addresses")
    if not texts:
        report(path, "addresses is missing; expected one address")
        return None
    if address_type not in ("IPv4", "IPv6"):
        return None
    expected = 4 if address_type == "IPv4" else 6
    first = None
    for index, text in enumerate(texts):
        address = read_address(text)
        if isinstance(address, str):
            message = address
        elif address.version != expected:
            message = f"{text} is not an {address_type} address, as addressType says"
        elif what := special(address):
            message = f"{text} is {what}; an endpoint must be an address that packets can be sent to"
        else:
            first = address if index == 0 else first
            continue
        report((*path, "addresses", index), message)
    return first


def _endpoint(written: dict[str, Any], address: Any) -> SliceEndpoint:
    conditions = written.get("conditions") or {}
    hints = written.get("hints")
    return SliceEndpoint(
        address,
        _state(conditions.get("ready"), conditions.get("serving"), conditions.get("terminating")),
        written.get("nodeName"),
        written.get("zone"),
        _hint_names(hints, "forZones") if hints else (),
        _hint_names(hints, "forNodes") if hints else (),
        (written.get("targetRef") or {}).get("uid") or "",
    )


def _hint_names(hints: dict[str, Any], key: str) -> tuple[str, ...]:
    return tuple([hint["name"] for hint in hints.get(key) or () if hint.get("name")])


def _state(ready: bool | None, serving: bool | None, terminating: bool | None) -> EndpointState:
    """Return the state that three conditions make; unknown ones count as ready, serving, not terminating (E3, E5)."""
    if ready is None or ready:
        return EndpointState.READY
    if not terminating:
        return EndpointState.UNREADY
    return EndpointState.SERVING if serving is None or serving else EndpointState.TERMINATING


# Objects together.


def _conflicts(
    services: Sequence[tuple[Service, _Origin]], slices: Sequence[tuple[EndpointSlice, _Origin]]
) -> Iterator[_Found]:
    yield from _same_names([(service.namespace, service.name, origin) for service, origin in services])
    yield from _same_names([(part.namespace, part.name, origin) for part, origin in slices])
    yield from _same_claims(services)
    yield from _endpoints_that_are_vips(services, slices)


def _same_names(objects: Sequence[tuple[str, str, _Origin]]) -> Iterator[_Found]:
    first: dict[tuple[str, str], _Origin] = {}
    for namespace, name, origin in objects:
        other = first.setdefault((namespace, name), origin)
        if other is not origin:
            where = "" if other.file == origin.file else f" in {_printable(other.file)}"
            yield _Found(origin, ("metadata", "name"), f"an object of this kind and name is{where or ' above'} already")


def _same_claims(services: Sequence[tuple[Service, _Origin]]) -> Iterator[_Found]:
    """Find what wants an address, port and protocol that is another's (S13): of another Service, or of its own."""
    first: dict[tuple[Any, int, str], tuple[documents.Path, _Origin]] = {}
    for service, origin in services:
        for address, port, protocol, path in claims(service):
            owner, other = first.setdefault((address, port, protocol), (path, origin))
            if other is not origin:
                yield _Found(origin, path, f"{_spot(address, port, protocol)} belongs to {other.name} already")
            elif owner != path:
                yield _Found(origin, path, f"{_spot(address, port, protocol)} belongs to {dotted(owner)} already")


def _spot(address: Any, port: int, protocol: str) -> str:
    if address is None:
        return f"node port {port}/{protocol}"
    return f"[{address}]:{port}/{protocol}" if address.version == 6 else f"{address}:{port}/{protocol}"


def _endpoints_that_are_vips(
    services: Sequence[tuple[Service, _Origin]], slices: Sequence[tuple[EndpointSlice, _Origin]]
) -> Iterator[_Found]:
    """Find endpoints that would send a packet in a circle (E8): a VIP of their own Service, or anybody's cluster IP.

    External and load balancer addresses of another Service may be a host's own, so they are let through.
    """
    cluster_ips = {}
    others: dict[tuple[str, str], set[Any]] = {}
    for service, origin in services:
        if service.is_proxied:
            for address in service.cluster_ips:
                cluster_ips[address] = origin
            if service.external_ips or service.ingress:
                others[service.namespace, service.name] = {address for _, address, _ in vips(service)}
    for part, origin in slices:
        if not part.is_used:
            continue
        own = others.get((part.namespace, part.service_name or ""), ())
        for index, endpoint in enumerate(part.endpoints):
            address = endpoint.address
            if address in cluster_ips or address in own:
                by_other = cluster_ips.get(address)
                owner = by_other.name if by_other else f"Service {part.namespace}/{part.service_name}"
                path = ("endpoints", index, "addresses", 0)
                yield _Found(origin, path, f"{address} is a VIP of {owner}; an endpoint must be a pod or a host")
