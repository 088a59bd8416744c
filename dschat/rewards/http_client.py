"""JSON over HTTP, for graders that ask a server."""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from typing import Any

LARGEST_REPLY = 2**24  # bytes
LONGEST_WAIT_S = 60.0  # between two attempts
SHOWN = 200  # characters of a reply in a message
BUSY = {408, 429, 500, 502, 503, 504}  # answers of servers that may work later


class ServerError(Exception):
    """Raised if a server does not give a usable answer."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treat a redirect as an error: a text or a key would go to a server that nobody named."""

    def redirect_request(self, *args, **kwargs) -> None:
        return None


class JsonClient:
    """POST requests of JSON to one address.

    Redirects are not followed, and replies over 16 MiB are refused.
    """

    def __init__(self, url: str, *, timeout_s: float = 60.0, retries: int = 3, key_env: str = ""):
        """Check the options.

        Args:
            url: the address, http or https.
            timeout_s: seconds to wait for the server, in each attempt.
            retries: further attempts if the server cannot be reached or is busy.
            key_env: name of the environment variable that holds a bearer token; "": none is sent.

        Raises:
            ValueError: an option is bad, or the variable is not set.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}; it must begin with http:// or https://")
        if timeout_s <= 0 or retries < 0:
            raise ValueError(
                f"timeout_s is {timeout_s} and retries {retries}; they must be above 0 and at "
                "least 0"
            )
        if key_env and not os.environ.get(key_env):
            raise ValueError(f"key_env names {key_env}, and there is no such environment variable")
        self.url = url
        self.timeout_s = timeout_s
        self.retries = retries
        self._key_env = key_env
        self._opener = urllib.request.build_opener(_NoRedirect)

    def post(self, value: Any) -> Any:
        """Send `value` and return the reply, both as JSON.

        Raises:
            ServerError: there is no usable reply after all attempts.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._post_once(value)
            except urllib.error.HTTPError as error:
                message = f"{self.url} answered {error.code}: {_beginning(error)}"
                if error.code not in BUSY or attempt == self.retries:
                    raise ServerError(message) from error
                wait_s = _retry_after(error)
            except (OSError, http.client.HTTPException) as error:  # no connection, or no reply
                if attempt == self.retries:
                    reason = getattr(error, "reason", error)
                    raise ServerError(f"{self.url} cannot be reached: {reason}") from error
                wait_s = 0.0
            # Twice as long each time, and not in step with other clients.
            time.sleep(max(wait_s, min(LONGEST_WAIT_S, 0.5 * 2**attempt) * random.uniform(0.5, 1)))
        raise AssertionError("unreachable")

    def _post_once(self, value: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key_env:
            headers["Authorization"] = f"Bearer {os.environ[self._key_env]}"
        data = json.dumps(value).encode()
        request = urllib.request.Request(self.url, data, headers, method="POST")
        with self._opener.open(request, timeout=self.timeout_s) as reply:
            body = reply.read(LARGEST_REPLY + 1)
        if len(body) > LARGEST_REPLY:
            raise ServerError(f"{self.url} answered with more than {LARGEST_REPLY} bytes")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{self.url} did not answer with JSON: {body[:SHOWN]!r}") from error


def _beginning(error: urllib.error.HTTPError) -> str:
    if 300 <= error.code < 400:
        return "redirects are not followed; give the final address"
    try:
        return error.read(SHOWN).decode("utf-8", "replace")
    except OSError:
        return ""


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Return the seconds that the server asks to wait, bounded; 0 if it names none."""
    text = error.headers.get("Retry-After", "") if error.headers else ""
    return min(LONGEST_WAIT_S, float(text)) if text.isdecimal() else 0.0
