"""A web server on loopback that fails in all the ways that servers fail."""

import http.server
import re
import threading
import time
from functools import partial
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on loopback. `faults` are spent one a GET, on paths that match `faulty`; `log` has every GET."""

    daemon_threads = True
    request_queue_size = 128  # five waiting connections, the default, are fewer than a reader opens

    def __init__(self, folder: Path, *, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.folder, self.ranges, self.faults, self.faulty, self.log = folder, ranges, [], r"\.tar", []
        self.waiting = self.most_waiting = 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        self.server.log.append((path.name, asked))
        fault = self.server.faults.pop(0) if self.server.faults and re.search(self.server.faulty, path.name) else ""
        if fault == "late":
            self.server.waiting += 1
            self.server.most_waiting = max(self.server.most_waiting, self.server.waiting)
            time.sleep(0.3)
            self.server.waiting -= 1
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        if asked and self.server.ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups()
            data, status = data[int(first) : int(last) + 1], 206
        if fault == "drop at once":
            self.connection.close()
            return
        if fault == "short":  # in itself a sound answer, just not the whole
            data = data[: len(data) // 2]
        if fault == "flipped":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in ("drop in the middle", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(1.5 if fault == "stall" else 0)
            self.connection.close()
            return
        for start in range(0, len(data), 1000):
            self.wfile.write(data[start : start + 1000])
            time.sleep(0.02 if fault == "slow" else 0)
