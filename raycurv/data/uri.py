"""URIs that ``pyarrow.fs`` understands: extended below, probed, and shown without their secrets;
and what a place that a person names may look like.

    s3://KEY:SECRET@bucket/run?endpoint_override=http://127.0.0.1:9000&scheme=http
    -------------------------- -----------------------------------------------------
    address                    options, which belong to the file system and not to the name

What a person sees and what a run records is :func:`shown`: a URI that opens the same place for
whoever has credentials of their own (in the environment, say).
"""

from __future__ import annotations

import os
import re
import socket
from urllib.parse import parse_qs, quote, quote_plus, unquote, unquote_plus, urlsplit

from raycurv.errors import UserError, user_errors

_CONNECT_SECONDS = 5.0

# What follows these is a bucket, which has no colon.
_BUCKETS = ("s3", "s3a", "s3n", "gs", "gcs")
# Of these the part before the @, up to its colon, is no credential: a container, or a user's name.
_NAMED_USER = ("abfs", "abfss", "hdfs", "viewfs")
# What a file system may be told beside its address and is no secret: all that pyarrow.fs takes for
# s3, gs, abfs and hdfs, but for credentials and names of accounts. Everything else is hidden.
_HARMLESS = (
    "endpoint_override", "scheme", "region", "allow_bucket_creation", "allow_bucket_deletion",
    "force_virtual_addressing", "check_directory_existence_before_creation", "allow_delayed_open",
    "background_writes", "tls_verify_certificates", "smart_defaults", "anonymous",
    "retry_limit_seconds", "default_bucket_location",
    "credential_kind", "enable_tls", "blob_storage_authority", "blob_storage_scheme",
    "dfs_storage_authority", "dfs_storage_scheme", "replication", "buffer_size",
)  # fmt: skip
_SCHEMES = (
    "s3|s3a|s3n|gs|gcs|hdfs|webhdfs|viewfs|abfs|abfss|wasb|wasbs|adl|az|azure|oss|cos|hf|"
    "file|http|https|ftp|ftps|sftp|ssh|ray"
)
# A URI with one slash, with none, or without its colon: to a file system, a relative path.
_SLIPPED = re.compile(rf"\s*(?:{_SCHEMES})(?::/?(?!/)|//)", re.IGNORECASE)
# A URI, or one that has slipped, within a text; what ends a sentence is not part of it.
_IN_TEXT = re.compile(
    rf"(?<![A-Za-z0-9+.-])(?:[A-Za-z][A-Za-z0-9+.-]*://|(?:{_SCHEMES}):/)"
    r"[^\s'\"<>]*[^\s'\"<>.,:;)\]}]",
    re.IGNORECASE,
)
# Options that stand in an address, after a question mark that was forgotten.
_MISPLACED = re.compile(r"([;&])([^/;&=]*)=[^/;&]*")
# Shorter texts are no secrets, and stand everywhere.
_SHORTEST_SECRET = 3
_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def is_uri(text: str) -> bool:
    """Whether a text is a URI and not a path of this machine."""
    return "://" in text


def check_place(flag: str, text: str) -> None:
    """Refuse what cannot name a place: a URI that would be taken for a directory of that name, and
    what no file system takes as a path.

    Args:
        flag: what named it.
        text: a path, a glob, a URI, or the name of a callable.

    Raises:
        UserError: shows no credentials.
    """
    if _SLIPPED.match(text) and not is_uri(text):
        scheme = re.split("[:/]", text.strip(), maxsplit=1)[0].lower()
        wanted = f"{scheme}:///path" if scheme == "file" else f"{scheme}://…"
        raise UserError(
            flag, f"a path, or a URI with its colon and two slashes ({wanted})", repr(shown(text)),
            f"Write {wanted}; a directory of that name on this machine is ./{scheme}:…",
        )  # fmt: skip
    if text != text.strip():
        raise UserError(
            flag, "a place without blanks around it", repr(shown(text)),
            "Take them away; a name that begins with one is ./NAME, one that ends with one NAME/.",
        )  # fmt: skip
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise UserError(
            flag, "a name in UTF-8", repr(shown(text)), "Rename the file or directory."
        ) from None
    if b"\0" in raw:
        raise UserError(flag, "a path", f"{shown(text)!r}, with a NUL in it", "Leave the NUL out.")
    if is_uri(text):
        return
    longest = max(len(name) for name in raw.split(b"/"))
    if len(raw) > _LONGEST_PATH or longest > _LONGEST_NAME:
        raise UserError(
            flag, f"a path of at most {_LONGEST_PATH} bytes, each name of at most {_LONGEST_NAME}",
            f"{len(raw):,} bytes, a name of {longest:,}", "Choose a shorter one.",
        )  # fmt: skip


def shown(text: str) -> str:
    """A URI without its credentials, and anything else as it is."""
    if not is_uri(text):
        slipped = _SLIPPED.match(text)
        if slipped is None or (slipped[0].strip().lower().startswith("file:") and "@" not in text):
            return text
        # Nobody can tell which part is secret.
        return f"{slipped[0]}***"
    scheme, slashes, user, rest = _parted(text)
    address, mark, options = rest.partition("#")[0].partition("?")
    address = _MISPLACED.sub(_without_value, address)
    kept = "&".join(option for option in map(_option, options.split("&")) if option)
    name = _name_of(scheme, user)
    at = "@" if name else ""
    return f"{scheme}://{slashes}{name}{at}{address}{mark if kept else ''}{kept}"


def recorded_place(text: str) -> str:
    """Where something lies, as a run records it: the path of this machine from its root on, a URI
    without its credentials."""
    local = text and not is_uri(text) and shown(text) == text
    return os.path.join(os.getcwd(), os.path.expanduser(text)) if local else shown(text)


def hidden(text: object) -> str:
    """A text (a message of a library's, a traceback) with the URIs in it as :func:`shown`."""
    return _IN_TEXT.sub(lambda found: shown(found[0]), str(text))


def secrets_in(text: str) -> set[str]:
    """The credentials of the URIs in a text, as they may stand in messages."""
    found: set[str] = set()
    for uri in _IN_TEXT.findall(text):
        if not is_uri(uri):
            user = uri.partition(":")[2].strip("/").rpartition("@")[0]
            found |= {user, user.partition(":")[2]}
            continue
        scheme, _, user, rest = _parted(uri)
        place, _, fragment = rest.partition("#")
        address, _, options = place.partition("?")
        if _name_of(scheme, user) != user:
            found |= {user, user.partition(":")[2]}
        for option in options.split("&"):
            value = option.partition("=")[2]
            found |= secrets_in(unquote_plus(value)) if _option(option) else {value}
        found |= {
            part[0].partition("=")[2]
            for part in _MISPLACED.finditer(address)
            if _without_value(part) != part[0]
        }
        found |= {fragment}
    forms = (str, unquote, unquote_plus, quote, quote_plus, lambda secret: quote(secret, ""))
    return {
        form for secret in found for form in (f(secret) for f in forms)
        if len(form) >= _SHORTEST_SECRET
    }  # fmt: skip


def redacted(message: object, uri: str) -> str:
    """What a library says of a URI (``str(error)``), without the URI's credentials."""
    text = str(message)
    user = _parted(uri)[2] if is_uri(uri) else ""
    if user:
        text = text.replace(f"{user}@", "")
    for secret in sorted(secrets_in(uri), key=len, reverse=True):
        text = text.replace(secret, "***")
    return hidden(text)


def below(uri: str, name: str) -> str:
    """The URI of what lies below another: its options stay behind the name."""
    address, mark, options = uri.partition("?")
    return f"{address.rstrip('/')}/{quote(name)}{mark}{options}"


def check_endpoint(uri: str, where: str) -> None:
    """Refuse, with a UserError and within seconds, a URI at whose endpoint nothing answers.

    File systems try for minutes; only an endpoint that the URI names can be probed.
    """
    options = parse_qs(uri.partition("?")[2])
    endpoint = options.get("endpoint_override", [""])[-1]
    if not endpoint:
        return
    plain = "http" in (options.get("scheme", [""])[-1], endpoint.partition("://")[0])
    wanted = f"an object store that answers at {endpoint}"
    remedy = "Check endpoint_override and scheme in the URI, and that this machine reaches it."
    with user_errors(where, wanted, remedy, OSError, ValueError, got="{error}"):
        place = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
        port = place.port or (80 if plain else 443)
        socket.create_connection((place.hostname or "", port), _CONNECT_SECONDS).close()


def _parted(uri: str) -> tuple[str, str, str, str]:
    """Scheme, slashes too many, what stands before the @, and the rest."""
    scheme, _, rest = uri.partition("://")
    named = scheme.strip().lower() in (*_NAMED_USER, "file")
    slashes = "" if named else "/" * (len(rest) - len(rest.lstrip("/")))
    rest = rest[len(slashes) :]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    end = authority.rfind("@")
    if end < 0 and ":" in authority and scheme.strip().lower() in _BUCKETS:
        # No bucket has a colon: a secret with a bare slash or question mark, or without its @.
        end = rest.rfind("@")
        if end < 0:
            return scheme, slashes, authority, rest[len(authority) :]
    return scheme, slashes, rest[: max(end, 0)], rest[end + 1 :]


def _name_of(scheme: str, user: str) -> str:
    """The part before the @ that is no credential."""
    scheme = scheme.strip().lower()
    if scheme in _NAMED_USER:
        return re.split(":|%3a", user, maxsplit=1, flags=re.IGNORECASE)[0]
    # The wish to be nobody.
    return user if scheme == "gs" and user == "anonymous" else ""


def _option(option: str) -> str:
    """An option as it is shown; empty for one that is not known to be harmless."""
    name, mark, value = option.partition("=")
    if unquote_plus(name) not in _HARMLESS:
        return ""
    plain = unquote_plus(value)
    # The endpoint is a URI of its own, at times.
    return option if hidden(plain) == plain else f"{name}{mark}{quote(hidden(plain), ':/')}"


def _without_value(found: re.Match[str]) -> str:
    return found[0] if unquote_plus(found[2]) in _HARMLESS else f"{found[1]}{found[2]}=***"
