"""The package `ssl` is the standard module and our subpackages at once, wherever Python is started.

Most checks run in a child process, since what matters is who imports `ssl` first: pytest's plugins do so before us. The
functions named `_child_...` are what such a child runs.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _run(*arguments: object, cwd: Path = ROOT, pythonpath: Path | None = None, timeout: float = 180) -> str:
    """Run this interpreter as a person would from `cwd`, without what pytest has set; return what it printed."""
    done = _try(*arguments, cwd=cwd, pythonpath=pythonpath, timeout=timeout)
    assert done.returncode == 0, f"{done.args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _try(
    *arguments: object, cwd: Path, pythonpath: Path | None = None, timeout: float = 60
) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(pythonpath)} if pythonpath else {})
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def _call(function: str, *arguments: object) -> str:
    """Run a function of this file in a child started from the root."""
    code = f"import sys; from tests.test_name import {function} as f; f(*sys.argv[1:])"
    return _run("-c", code, *arguments)


IMPORT_ALONE = """
import sys
before = set(sys.modules)
import ssl
imported = set(sys.modules) - before
assert not imported & {"torch", "hydra", "numpy", "omegaconf", "timm"}, imported
assert not [name for name in imported if name.startswith("ssl.")], imported
assert len(ssl.__path__) == 1 and ssl.__path__[0].endswith("ssl")
import ssl.methods
import inspect
assert inspect.getsource(ssl.SSLContext).startswith("class SSLContext")
assert ssl.SSLContext.__module__ == "ssl" and sys.modules["ssl"] is ssl
print(ssl.create_default_context().verify_mode.name)
"""


def test_import_ssl_is_the_whole_standard_module_and_nothing_heavy() -> None:
    assert _run("-c", IMPORT_ALONE) == "CERT_REQUIRED\n"


def test_pythonpath_serves_every_folder_and_safe_path(tmp_path: Path) -> None:
    assert _run("-P", "-c", IMPORT_ALONE, cwd=tmp_path, pythonpath=ROOT) == "CERT_REQUIRED\n"


def test_another_folder_without_pythonpath_gives_the_errors_that_the_readme_names(tmp_path: Path) -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    for arguments, message in [
        (("-m", "ssl.pretrain"), "__path__ attribute not found on 'ssl' while trying to find 'ssl.pretrain'"),
        (("-c", "import ssl.pretrain"), "'ssl' is not a package"),
    ]:
        done = _try(*arguments, cwd=tmp_path)
        assert done.returncode != 0
        assert message in done.stderr
        assert message in readme


def test_a_notebook_that_imported_the_standard_module_gets_our_parts_through_eval(tmp_path: Path) -> None:
    first = "import ssl, sys; context = ssl.SSLContext; assert not hasattr(ssl, '__path__')"
    then = "sys.path.insert(0, sys.argv[1]); import eval; import ssl.methods; assert ssl.SSLContext is context"
    _run("-c", f"{first}; {then}", ROOT, cwd=tmp_path)


def _standard_names() -> set[str]:
    return set(json.loads(_run("-I", "-c", "import ssl, json; print(json.dumps(dir(ssl)))")))


def test_no_submodule_bears_a_name_of_the_standard_module() -> None:
    names = _standard_names()
    assert {"os", "socket", "SSLContext"} <= names
    folder = ROOT / "ssl"
    modules = {path.stem for path in folder.rglob("*.py")} | {path.name for path in folder.rglob("*/") if path.is_dir()}
    assert "methods" in modules
    assert (modules - {"__init__", "__pycache__"}) & names == set()


def _child_import_everything() -> None:
    import importlib
    import pkgutil

    import ssl

    before = dict(vars(ssl))
    assert "SSLContext" in before
    assert "methods" not in before
    found = [module.name for module in pkgutil.walk_packages(ssl.__path__, "ssl.")]
    for name in found:
        importlib.import_module(name)
    assert "ssl.methods.base" in found
    changed = [name for name, value in before.items() if vars(ssl)[name] is not value]
    assert not changed, changed


def test_importing_every_submodule_leaves_the_standard_names_alone() -> None:
    _call("_child_import_everything")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for localhost that signs itself, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "localhost.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


def _child_speak_tls(certificate: str) -> None:
    import http.server
    import threading
    import urllib.error
    import urllib.request

    import ssl

    assert hasattr(ssl, "__path__")

    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:  # the client that does not trust us hangs up
            pass

    server = Quiet(("127.0.0.1", 0), Hello)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(context: ssl.SSLContext) -> str:
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with direct.open(f"https://127.0.0.1:{server.server_port}/hello", timeout=20) as answer:
            return answer.read().decode()

    assert get(ssl.create_default_context(cafile=certificate)) == "/hello"
    with pytest.raises(urllib.error.URLError) as refused:
        get(ssl.create_default_context())
    assert isinstance(refused.value.reason, ssl.SSLCertVerificationError)
    server.shutdown()

    import wandb

    assert wandb.__version__
    assert sys.modules["ssl"] is ssl


def test_a_tls_handshake_urllib_and_wandb_work(certificate: Path) -> None:
    _call("_child_speak_tls", certificate)


class _ImportsInTheWorker:
    """A dataset whose item is what `ssl` is in the process that reads it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[int, bool, bool]:
        import ssl
        import ssl.distributed

        return os.getpid(), hasattr(ssl, "__path__"), callable(ssl.create_default_context)


def _child_load(*methods: str) -> None:
    from torch.utils.data import DataLoader

    for method in methods:
        loader = DataLoader(_ImportsInTheWorker(), num_workers=1, multiprocessing_context=method, batch_size=None)  # pyright: ignore
        [(pid, has_parts, is_whole)] = list(loader)
        assert has_parts, method
        assert is_whole, method
        assert pid != os.getpid()


def test_dataloader_workers_under_spawn_and_forkserver_have_both() -> None:
    _call("_child_load", "spawn", "forkserver")


def test_bare_pytest_from_the_root_finds_our_parts() -> None:
    script = Path(sys.executable).with_name("pytest")
    assert script.exists()
    name = "test_this_process_has_our_parts_on_the_standard_module"
    assert "1 passed" in _run(script, "-p", "no:cacheprovider", f"tests/test_name.py::{name}")


def test_this_process_has_our_parts_on_the_standard_module() -> None:
    import ssl
    import ssl.methods

    assert ssl.SSLContext.__module__ == "ssl"
    assert ssl.methods.__file__ == str(ROOT / "ssl" / "methods" / "__init__.py")


def test_torchrun_pretrains_by_module_name(tmp_path: Path) -> None:
    settings = "method=simclr model=resnet18 data=embedded data.limit=32 trainer.steps=2 trainer.global_batch_size=16"
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m ssl.pretrain"
    _run(
        *f"-m {launcher} {settings} trainer.device=cpu wandb.mode=disabled".split(),
        f"out={tmp_path}/run",
        timeout=400,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
    assert lines[-1]["loss"] > 0


def test_the_standard_librarys_quick_tests_pass_against_the_package() -> None:
    """All of them, which open many connections and take most of a minute, run with `make test-name`."""
    pytest.importorskip("test.test_ssl", reason="this Python came without the standard library's tests")
    kinds = ["ContextTests", "BasicSocketTests", "SSLErrorTests", "MemoryBIOTests", "SSLObjectTests"]
    printed = _run("-m", "test", "test_ssl", *[f"-m{kind}" for kind in kinds])
    assert "Result: SUCCESS" in printed or "Tests result: SUCCESS" in printed
