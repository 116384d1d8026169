"""Server reflection: what grpcurl and its like ask a server for. One answer for each request, bytes in, bytes out.

The messages are those of proto/grpc/reflection/v1alpha/reflection.proto.
"""

from __future__ import annotations

from narsil.protos import ProtoFile, files
from narsil.transports.endpoints import ALL_SERVICES
from narsil.wire import LEN, expect, put_len, put_uint, scan, text

_INVALID_ARGUMENT, _NOT_FOUND = 3, 5

# Fields of ServerReflectionRequest, of which the last one that is given counts.
_BY_FILENAME, _BY_SYMBOL, _BY_EXTENSION, _EXTENSIONS_OF, _LIST = 3, 4, 5, 6, 7


class Reflection:
    """Describes every service in the table of endpoints."""

    def __init__(self) -> None:
        """Raises ArtifactError where the package was not built."""
        self._by_name = {file.name: file for file in files()}
        self._by_symbol = {symbol: file for file in files() for symbol in file.symbols}

    def answer(self, body: bytes) -> bytes:
        """One serialized ServerReflectionRequest's answer. Raises InvalidRequest where it is none."""
        asked, about = 0, ""
        for found in scan(body, 0, len(body)):
            number, _, start, stop = found
            if _BY_FILENAME <= number <= _LIST:
                expect(found, LEN, f"ServerReflectionRequest field {number}")
                asked, about = number, "" if number == _BY_EXTENSION else text(body, start, stop, "a name")
        return put_len(2, body) + self._response(asked, about)

    def _response(self, asked: int, about: str) -> bytes:
        """The field of ServerReflectionResponse that answers."""
        if asked == _LIST:
            return put_len(6, b"".join(put_len(1, put_len(1, name.encode())) for name in sorted(ALL_SERVICES)))
        if asked == _BY_FILENAME:
            return _described(self._by_name.get(about))
        if asked == _BY_SYMBOL:
            return _described(self._by_symbol.get(about))
        if asked == _EXTENSIONS_OF and about in self._by_symbol:
            return put_len(5, put_len(1, about.encode()))  # none of ours has extensions
        return _refused(_NOT_FOUND, "not found") if asked else _refused(_INVALID_ARGUMENT, "the request asks nothing")


def _described(file: ProtoFile | None) -> bytes:
    return _refused(_NOT_FOUND, "not found") if file is None else put_len(4, put_len(1, file.descriptor))


def _refused(code: int, why: str) -> bytes:
    return put_len(7, put_uint(1, code) + put_len(2, why.encode()))
