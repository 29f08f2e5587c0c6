"A small model that eva_train trained, and servers of it on real sockets, for tests"

import contextlib
import io
import json
import threading
import time
from pathlib import Path

from eva.cli.serve import listen, load_service, make_server, serve_parser
from eva.cli.train import eva_train

TEMPLATE = """{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""


def train(folder: Path, chat: bool = False) -> Path:
    "Train a small model on small functions, and return its folder"
    texts = folder / 'texts'
    texts.mkdir(parents=True)
    for i in range(40):
        (texts / f'{i}.py').write_text(f'def f{i}(x):\n    return x + {i}\n' * 12)
    small = ['--data', texts, '--out', folder / 'run', '--steps', 30, '--seq_len', 64]
    small += ['--batch_size', 4, '--vocab_size', 320, '--precision', 'fp32']
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        assert eva_train([str(o) for o in small]) == 0, quiet.getvalue()
    return folder / 'run'


def with_template(folder: Path) -> Path:
    "Give a folder a chat template"
    path = folder / 'tokenizer_config.json'
    about = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(about | dict(chat_template=TEMPLATE)))
    return folder


class Running:
    "A server in a thread of this process"

    def __init__(self, folder, *options, change=None):
        self.args = serve_parser().parse_args([str(folder), '--port', '0', *map(str, options)])
        self.service = load_service(self.args)
        if change is not None:
            change(self.service)
        self.engine = self.service.thread.inside.engine
        self.sock = listen(self.args.host, self.args.port)
        self.port = self.sock.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.server = make_server(self.service, self.args.drain)
        self.thread = threading.Thread(
            target=self.server.run, kwargs=dict(sockets=[self.sock]), daemon=True
        )

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive(), 'the server did not end'

    def idle(self, seconds=10.0):
        "Wait until nothing runs; return whether all pages that are not kept for sharing are free"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.engine.stats
            if not (self.engine.busy or self.service.thread.admitted or stats.running):
                return stats.free_pages + stats.kept_pages == stats.pages
            time.sleep(0.01)
        return False
