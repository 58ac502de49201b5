"""A real browser without a window, driven through the DevTools protocol over two pipes."""

import json
import os
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38, "End": 35, "Tab": 9}


class Page:
    """One page; use it as a context."""

    def __init__(self, path, folder):
        """path: of an HTML file; folder: for the browser's profile and what the page saves."""
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        words += [f"--user-data-dir={folder / 'profile'}", "--window-size=1300,900", "about:blank"]

        def as_3_and_4():  # where the browser expects them
            read, write = os.dup(to_read), os.dup(to_write)
            os.dup2(read, 3), os.dup2(write, 4)

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._browser = subprocess.Popen(words, preexec_fn=as_3_and_4, close_fds=False, **quiet)
        os.close(to_read), os.close(to_write)
        self._n, self._rest, self._session, self.events = 0, b"", None, []
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._call("Page.enable")
        self.open(path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._browser.kill()
        self._browser.wait()
        os.close(self._read), os.close(self._write)

    def _message(self):
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 16)
            if not more:
                raise RuntimeError("the browser is gone")
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _call(self, method, **params):
        self._n += 1
        message = {"id": self._n, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._n:
            self.events.append(answer.get("method"))
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path):
        """Go to a file and wait until it is there."""
        self.events.clear()
        self._call("Page.navigate", url=path.as_uri())
        self._loaded()

    def reload(self):
        self.events.clear()
        self._call("Page.reload")
        self._loaded()

    def _loaded(self):
        while "Page.loadEventFired" not in self.events:
            self.events.append(self._message().get("method"))

    def js(self, expression):
        """What a JavaScript expression gives, as plain types."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, *keys):
        """Keys as a keyboard sends them."""
        for key in keys:
            how = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
            text = {"text": key} if len(key) == 1 else {}
            self._call("Input.dispatchKeyEvent", type="keyDown", **how, **text)
            self._call("Input.dispatchKeyEvent", type="keyUp", **how)
