"""Reading the documents that users give: XML or JSON, from a file or standard input."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from typing import TypeVar

from pullback import errors
from pullback.model.documents.fields import Place

T = TypeVar("T")
#: Bytes of a document in JSON; XML has a lower limit of its own.
MAX_BYTES = 16 << 20
#: Files that say so by their name; others are looked at.
_JSON_NAME, _XML_NAME = ".json", ".xml"


def document(path: str, root: str, *, xml: Callable[[bytes], T], values: Callable[[object], T]) -> T:
    """The document in a file, or on standard input for `-`.

    `xml` and `values` make it from XML text and from JSON values. Raises `BadDocument`, `UsageError`.
    """
    text = _read(path)
    if not _is_json(path, text):
        return xml(text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Place(document=root).bad("is neither XML nor JSON") from error
    return values(found)


def _is_json(path: str, text: bytes) -> bool:
    if path.endswith((_JSON_NAME, _XML_NAME)):
        return path.endswith(_JSON_NAME)
    return text.lstrip(b" \t\r\n\xef\xbb\xbf\xff\xfe\0")[:1] != b"<"


def _read(path: str) -> bytes:
    if path == "-":
        text = sys.stdin.buffer.read(MAX_BYTES + 1)
    else:
        try:
            with open(path, "rb") as file:
                if stat.S_ISDIR(os.fstat(file.fileno()).st_mode):
                    raise errors.UsageError(problem=f"{path} is a directory")
                text = file.read(MAX_BYTES + 1)
        except PermissionError as error:
            raise errors.PermissionDenied(path=path) from error
        except OSError as error:
            raise errors.UsageError(problem=f"{path} cannot be read ({error.strerror})") from error
    if len(text) > MAX_BYTES:
        raise errors.UsageError(problem=f"{path} is longer than {MAX_BYTES} bytes, so it is no document")
    return text
