"""A loopback server that speaks the Messages API, answers by script and misbehaves when told to.

    python tests/messages_server.py [PORT]      a teacher for trying things out: looks, then submits

A script is a function of the request's body that returns a list of content blocks, the fields of a
whole message, or a Fault.
"""

import json
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fault:
    """What goes wrong with one answer."""

    status: int = 200
    headers: dict = field(default_factory=dict)
    body: str = ""
    drop: bool = False  # close the connection without an answer
    hold: threading.Event | None = None  # do not answer before it is set
    drip: threading.Event | None = None  # send one byte at a time until it is set


def call(name, **given):
    """Return a tool call, as a block of an answer."""
    return {"type": "tool_use", "id": f"toolu_{name}", "name": name, "input": given}


def submit(guidance="Look closely at the object in the hand.", **given):
    """Return a patch, as a block of an answer."""
    given = {"error_type": "temporal", "query_kind": "attribute", "key_frames": [1, 3]} | given
    return call("submit_patch", guidance=guidance, **given)


def looks_then_submits(body):
    """Answer with a whole diagnosis: three looks of three kinds, then a patch."""
    turn = sum(message["role"] == "assistant" for message in body["messages"])
    if turn == 0 and any(tool["name"] == "get_frame" for tool in body["tools"]):
        return [
            call("get_frame", index=0),
            call("get_temporal_segment", start=0, end=1, stride=0.5),
        ]
    if turn == 1 and body["tool_choice"]["type"] != "tool":
        return [call("zoom_region", index=0, x1=0, y1=0, x2=0.5, y2=0.5)]
    frames = sum(block["type"] == "image" for block in body["messages"][0]["content"])
    return [submit("Look again, frame by frame.", key_frames=[0, frames - 1])]


class MessagesServer:
    """A server on a free port; `seen` holds (time, headers, body) of every request."""

    usage = {
        "input_tokens": 10,
        "cache_creation_input_tokens": 200,
        "cache_read_input_tokens": 1000,
    }

    def __init__(self, script=looks_then_submits, port=0):
        self.script, self.seen, self.lock = script, [], threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                data = self.rfile.read(int(self.headers["Content-Length"]))
                server.answer(self, json.loads(data))

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 256

            def handle_error(self, *_):  # a client that gave up
                pass

        self.http = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    @property
    def bodies(self):
        return [body for _, _, body in self.seen]

    def answer(self, handler, body):
        with self.lock:
            self.seen.append((time.monotonic(), dict(handler.headers), body))
        reply = self.script(body)
        fault = reply if isinstance(reply, Fault) else Fault()
        if fault.hold is not None:
            fault.hold.wait(60)
        if fault.drop:
            handler.close_connection = True
            return
        text = fault.body
        if reply is not fault:
            message = {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": body["model"],
            }
            message |= {"stop_reason": "tool_use", "stop_sequence": None}
            message |= {"usage": self.usage | {"output_tokens": min(50, body["max_tokens"])}}
            text = json.dumps(message | (reply if isinstance(reply, dict) else {"content": reply}))
        data = text.encode()
        handler.send_response(fault.status)
        length = 1 << 20 if fault.drip else len(data)
        headers = {"Content-Type": "application/json", "Content-Length": str(length)}
        for name, value in (headers | fault.headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if fault.drip is not None:
            while not fault.drip.wait(0.05):
                handler.wfile.write(b" ")
                handler.wfile.flush()
        handler.wfile.write(data)


if __name__ == "__main__":
    with MessagesServer(port=int(sys.argv[1]) if sys.argv[1:] else 0) as running:
        print(
            f"export ANTHROPIC_API_KEY=none; --teacher anthropic --teacher_url {running.url}",
            flush=True,
        )
        threading.Event().wait()
