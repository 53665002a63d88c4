"""What an S3 server, or the way to it, has said: understood from the text of an error.

Pure. obstore gives one class for most errors, and the status, the body and the cause in its text.
Sources: Amazon S3 API reference, "Error responses"; texts as of obstore 0.12.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9.]{1,80})\s*</Code>")
_MESSAGE = re.compile(r"<Message>\s*([^<]{1,300}?)\s*</Message>", re.DOTALL)
_CAUSE = re.compile(r'(?:message|error): "((?:[^"\\]|\\.){1,200})"')
_CHECKSUM = re.compile("x-amz-(?:checksum|sdk-checksum)", re.IGNORECASE)
#: Statuses that may pass; 501 and 507 do not.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 529})
#: Codes that may pass, whatever the status: data that was cut or changed on its way, and a server that is busy.
_PASSING_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "TooManyRequests",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
_FULL_CODES = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
_REGION_CODES = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_EXPIRED_CODES = frozenset({"ExpiredToken", "TokenRefreshRequired", "InvalidToken"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An error: of the server if there is a status, or of the way to it."""

    status: int | None
    #: The server's name for it, or empty.
    code: str
    #: A few words, without a full stop.
    reason: str
    #: May it be over soon?
    passing: bool
    #: Does it complain about a checksum header?
    checksum: bool = False

    @property
    def no_bucket(self) -> bool:
        """There is no such bucket."""
        return self.code == "NoSuchBucket"

    @property
    def missing(self) -> bool:
        """There is no such object."""
        return self.status == 404

    @property
    def beyond(self) -> bool:
        """The range begins behind the object's end."""
        return self.status == 416

    @property
    def exists(self) -> bool:
        """The object is there, and should not be."""
        return self.status in (409, 412)

    @property
    def full(self) -> bool:
        """There is no room."""
        return self.status == 507 or self.code in _FULL_CODES

    @property
    def other_region(self) -> bool:
        """The bucket is in another region."""
        return self.code in _REGION_CODES or "configured region" in self.reason

    @property
    def denied(self) -> bool:
        """The credentials are wrong, too old, or not enough."""
        return self.status in (401, 403) or self.code in _EXPIRED_CODES


def understand(text: str) -> Answer:
    """The text of an error that obstore raised."""
    status, code, message = _STATUS.search(text), _CODE.search(text), _MESSAGE.search(text)
    name = code[1] if code else ""
    if status is None:
        return _of_the_way(text)
    number = int(status[1])
    said = " ".join(message[1].split()).rstrip(".") if message else ""
    reason = said or name or f"status {number}"
    return Answer(
        status=number,
        code=name,
        reason=f"{reason} ({name})" if name and name != reason else reason,
        passing=number in _PASSING or name in _PASSING_CODES,
        checksum=_CHECKSUM.search(text) is not None,
    )


def _of_the_way(text: str) -> Answer:
    """No answer at all, or one that nobody can read."""
    if "InvalidCertificate" in text:
        reason = "its certificate is not to be trusted (AWS_CA_BUNDLE names a file with other authorities)"
        return Answer(status=None, code="", reason=reason, passing=False)
    if "InvalidContentType" in text or "received corrupt message" in text:
        return Answer(
            status=None, code="", reason="it does not speak TLS (http:// instead of https://?)", passing=False
        )
    if "configured region" in text:
        reason = "it redirects, which tells of a wrongly configured region"
        return Answer(status=None, code="", reason=reason, passing=False)
    if "TimedOut" in text or "Timeout" in text:
        return Answer(status=None, code="", reason="no answer in time", passing=True)
    if "UnexpectedEof" in text or "IncompleteBody" in text or "Interrupted" in text or "IncompleteMessage" in text:
        return Answer(status=None, code="", reason="the connection was cut", passing=True)
    cause = _CAUSE.search(text)
    if "HttpError" in text or "HTTP error" in text:
        return Answer(status=None, code="", reason=cause[1] if cause else "the connection failed", passing=True)
    return Answer(status=None, code="", reason=text.splitlines()[0][:300].rstrip(".") if text else "?", passing=False)
