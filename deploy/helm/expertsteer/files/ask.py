"""What `helm test` runs: ask a served model with a profile, and check the receipt."""

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

TIMEOUT_S = 120


def call(path: str, body: Any = None) -> Any:
    """JSON answer of the server to a GET, or to a POST of `body`.

    Raises:
        urllib.error.HTTPError: the server refused.
    """
    headers = {"content-type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(os.environ["SERVER"].rstrip("/") + path, data, headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return json.load(response)


def check() -> str:
    """Ask once and return what was found, as one line.

    Raises:
        ValueError: the answer is not what was asked for.
        urllib.error.HTTPError: the server refused.
    """
    model = call("/v1/models")["data"][0]["id"].partition("@")[0]
    names = [profile["name"] for profile in call("/v1/steering/profiles")["profiles"]]
    profile = os.environ.get("PROFILE") or (names[0] if names else None)
    question = {"model": model, "prompt": os.environ["PROMPT"], "max_tokens": 8, "temperature": 0}
    if profile is None:
        answer = call("/v1/completions", question)
        return f"{model} answers {answer['choices'][0]['text']!r}; it has no profile yet, so nothing was steered."
    answer = call("/v1/completions", {**question, "steering_profile": profile})
    receipt = answer.get("steering") or {}
    if receipt.get("profile") != profile.partition("@")[0] or not receipt.get("tokens_steered"):
        raise ValueError(f"{model} was asked with profile {profile!r} and the receipt says {receipt}.")
    return (
        f"{model} with {profile} answers {answer['choices'][0]['text']!r}: {receipt['tokens_steered']} tokens "
        f"steered at strength {receipt['strength']} by {receipt['bundle']}."
    )


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{check()}\n")
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.url} answers {error.code}: {error.read().decode(errors='replace')}")
    except LookupError as error:
        sys.exit(f"{os.environ.get('SERVER')} does not answer as this server does: {error} is missing.")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
