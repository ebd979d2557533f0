"""A child for the tests of `benchmarks.processes`."""

from __future__ import annotations

import os
import sys
import time

from benchmarks.processes import Message, serve


def handle(message: Message) -> Message:
    print("noise on standard output")
    match message["do"]:
        case "environment":
            return dict(os.environ)
        case "raise":
            raise ValueError("as asked")
        case "exit":
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        case "hang":
            time.sleep(600)
    return {"value": message.get("value")}


if __name__ == "__main__":
    serve(handle)
