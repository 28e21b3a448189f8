"""A server with the chat-completions interface, without a model behind it: it takes the tool that it is told to take, or
the first, with the number in the question, and then says what the tool said.

    model.py ADDRESS PORT NAME
"""

import http.server
import itertools
import json
import re
import sys
import time

ADDRESS, PORT, NAME = sys.argv[1:4]
numbers = itertools.count(1)


def message(asked):
    """What the assistant says next."""
    messages, tools = asked["messages"], asked.get("tools", [])
    last = messages[-1]
    if last["role"] == "tool" or not tools:
        return {"role": "assistant", "content": f"{NAME} says: {last['content']}"}
    choice = asked.get("tool_choice")
    name = choice["function"]["name"] if isinstance(choice, dict) else tools[0]["function"]["name"]
    number = int(re.search(r"\d+", last["content"]).group())
    call = {"name": name, "arguments": json.dumps({"number": number})}
    called = {"id": f"call_{next(numbers)}", "type": "function", "function": call}
    return {"role": "assistant", "content": None, "tool_calls": [called]}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        if self.path != "/v1/chat/completions":
            return self.send_error(404)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = message(asked)
        reason = "tool_calls" if "tool_calls" in said else "stop"
        answer = {
            "id": f"chatcmpl-{next(numbers)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": asked["model"],
            "choices": [{"index": 0, "message": said, "finish_reason": reason}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        # Who asked, and for what: one line a request.
        print(json.dumps({"from": self.client_address[0], "asked": asked["messages"][-1], "said": said}), flush=True)

    def log_message(self, format, *arguments):
        pass


class Server(http.server.HTTPServer):
    # Its own name is not looked up.
    def server_bind(self):
        self.socket.setsockopt(http.server.socketserver.socket.SOL_SOCKET, http.server.socketserver.socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]


Server((ADDRESS, int(PORT)), Handler).serve_forever()
