"""A real ComfyUI server with the pack in its ``custom_nodes`` and small models in its folders."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACK_FILES = ("__init__.py", "pyproject.toml", "requirements.txt", "nodes", "sid_train", "workflows", "locales")


class Server:
    """ComfyUI in a process of its own, on a free port, with ``base`` as its base directory."""

    def __init__(self, comfyui: Path, base: Path, *options: str):
        self.base = base
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        pack = base / "custom_nodes" / "ComfyUI-SiD"
        pack.mkdir(parents=True, exist_ok=True)
        for name in PACK_FILES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, pack / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy(source, pack / name)
        for name in ("input", "output", "temp", "user", "models"):
            (base / name).mkdir(exist_ok=True)
        self.log = base / "comfyui.log"
        self.started = time.monotonic()
        command = [sys.executable, str(comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *command,
                    "--base-directory",
                    str(base),
                    "--disable-auto-launch",
                    "--preview-method",
                    "latent2rgb",
                    *options,
                ],
                cwd=comfyui,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait()
        self.seconds_to_start = time.monotonic() - self.started

    def _wait(self, timeout: float = 120) -> None:
        while time.monotonic() - self.started < timeout:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        self.close()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def post(self, path: str, content: object):
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read().decode()[:4000]}") from None
        return json.loads(body) if body else None

    def queue(self, prompt: dict) -> str:
        return self.post("/prompt", {"prompt": prompt, "client_id": "tests"})["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> dict:
        """The finished prompt's entry in the history."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.1)
        raise RuntimeError(f"prompt {prompt_id} took more than {timeout} s:\n{self.log.read_text()[-4000:]}")

    def run(self, prompt: dict) -> dict:
        """Outputs by node id; RuntimeError with ComfyUI's message where a node failed."""
        entry = self.wait(self.queue(prompt))
        errors = [content for kind, content in entry["status"]["messages"] if kind == "execution_error"]
        if errors:
            raise RuntimeError(f"{errors[0]['node_type']}: {errors[0]['exception_message']}{errors[0]['traceback']}")
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(f"{entry['status']}")
        return entry["outputs"]

    def picture(self, output: dict) -> Path:
        image = output["images"][0]
        return self.base / image["type"] / image["subfolder"] / image["filename"]
