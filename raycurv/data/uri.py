"""URIs that ``pyarrow.fs`` understands: extended below, probed, and shown without their secrets.

    s3://KEY:SECRET@bucket/run?endpoint_override=http://127.0.0.1:9000&scheme=http
    -------------------------- -----------------------------------------------------
    address                    options, which belong to the file system and not to the name

What a person sees and what a run records is :func:`shown`: a URI that opens the same place for
whoever has credentials of their own (in the environment, say).
"""

from __future__ import annotations

import re
import socket
from urllib.parse import parse_qs, quote, unquote, urlsplit

from raycurv.errors import user_errors

_CONNECT_SECONDS = 5.0

# Schemes whose part before the @ is nothing but credentials; elsewhere it names a user, a container
# or the wish to be nobody, and only what follows its colon is secret.
_KEYS_ALONE = ("s3", "s3a")
_SECRET_OPTION = re.compile(r"secret|passw|token|key|credential|^sas|^sig$", re.IGNORECASE)


def is_uri(text: str) -> bool:
    """Whether a text is a URI and not a path of this machine."""
    return "://" in text


def shown(text: str) -> str:
    """A URI without its credentials, and anything else as it is."""
    if not is_uri(text):
        return text
    scheme, user, rest = _parted(text)
    name = "" if scheme.lower() in _KEYS_ALONE else user.partition(":")[0]
    address, mark, options = rest.partition("?")
    kept = [o for o in options.split("&") if not _SECRET_OPTION.search(o.partition("=")[0])]
    options = "&".join(kept)
    return f"{scheme}://{name}{'@' if name else ''}{address}{mark if options else ''}{options}"


def redacted(message: object, uri: str) -> str:
    """What a library says of a URI (``str(error)``), without the URI's credentials."""
    text = str(message)
    if not is_uri(uri):
        return text
    _, user, rest = _parted(uri)
    secrets = [user, user.partition(":")[2]]
    for option in rest.partition("?")[2].split("&"):
        name, _, value = option.partition("=")
        if _SECRET_OPTION.search(name):
            secrets.append(value)
    if user:
        text = text.replace(f"{user}@", "")
    for secret in secrets:
        for form in (secret, unquote(secret)):
            text = text.replace(form, "***") if form else text
    return text


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


def _parted(uri: str) -> tuple[str, str, str]:
    """Scheme, what stands before the @, and the rest."""
    scheme, _, rest = uri.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    end = authority.rfind("@")
    if end < 0 and ":" in authority and scheme.lower() in _KEYS_ALONE:
        # No bucket has a colon: a secret with a bare slash or question mark, or without its @.
        end = rest.rfind("@")
        if end < 0:
            return scheme, authority, rest[len(authority) :]
    return scheme, rest[: max(end, 0)], rest[end + 1 :]
