"""A real `mlflow server` on loopback for the tests, and a proxy before it that breaks down as it is told to."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .conftest import environment, free_ports

START_LIMIT = 90  # seconds


# MLflow (3.17) protects the forms of its basic authentication by Flask-WTF, which it does not bring along; no test
# fills in a form.
NO_FORMS = """class CSRFProtect:
    def init_app(self, app): ...
    def exempt(self, view): return view
"""
AUTHENTICATION = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


class Server:
    """`mlflow server` with a SQLite file; it may be killed, and started again at the same address.

    With a user and a password it asks for them, by MLflow's own basic authentication.
    """

    def __init__(self, folder: Path, user: str = "", password: str = "") -> None:
        self._folder, self._options, self._variables = folder, list[str](), dict[str, str]()
        if user:
            (folder / "users.ini").write_text(AUTHENTICATION.format(folder=folder, user=user, password=password))
            (folder / "flask_wtf").mkdir()
            (folder / "flask_wtf/csrf.py").write_text(NO_FORMS)
            self._options = ["--app-name", "basic-auth"]
            self._variables = {"MLFLOW_AUTH_CONFIG_PATH": f"{folder}/users.ini", "PYTHONPATH": str(folder)}
            self._variables["MLFLOW_FLASK_SERVER_SECRET_KEY"] = "for forms"
        (self.port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        artifacts = ["--artifacts-destination", str(self._folder / "artifacts")]
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *artifacts, *address, *self._options],
                cwd=self._folder,
                env=environment(
                    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true", **self._variables
                ),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.2)
        self.kill()
        raise TimeoutError((self._folder / "log").read_text())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Proxy:
    """Passes HTTP requests on to a server, or treats them as `mode` says, where their path holds `on`.

    "pass"; "error": answers 500; "hang": never answers; "delay": passes on after `delay` seconds; "swallow": passes on,
    but never answers; "late": passes on only after `delay` seconds, when nobody waits for the answer any more.
    """

    def __init__(self, target: int, port: int = 0) -> None:
        self.target, self.mode, self.on, self.delay = target, "pass", "", 0.0
        self.authorization: str | None = None
        """The header without which a request is answered 401."""
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy

    def handle_one_request(self) -> None:
        with suppress(OSError):  # the client has gone
            super().handle_one_request()

    def _answer(self) -> None:
        proxy = self.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.requests.append(self.path)
        mode = proxy.mode if proxy.on in self.path else "pass"
        if proxy.authorization and self.headers.get("Authorization") != proxy.authorization:
            return self._reply(401, f"who is {self.headers.get('Authorization')}?".encode())
        if mode == "error":
            return self._reply(500, b"out of order")
        if mode in ("delay", "late"):
            time.sleep(proxy.delay)
        if mode == "hang":
            return time.sleep(60)
        connection = http.client.HTTPConnection("127.0.0.1", proxy.target)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            status, content = answer.status, answer.read()
        except OSError:
            status, content = 502, b""
        if mode == "swallow":
            return time.sleep(60)
        return self._reply(status, content)

    do_GET = do_POST = do_PUT = do_PATCH = _answer

    def _reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
