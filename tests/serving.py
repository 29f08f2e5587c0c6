"A small model trained in a moment, and servers of it on real sockets, for tests"

import json
import threading
import time
from pathlib import Path

import torch

from eva.cli.serve import listen, load_service, make_server, serve_parser
from eva.config import Config
from eva.data.tokenizer import train_tokenizer
from eva.model.transformer import DeepSeekV3

SIZES = dict(
    hidden_size=64,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    intermediate_size=128,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    max_position_embeddings=512,
)
TEMPLATE = """{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""


def train(folder: Path, steps: int = 60) -> Path:
    "Train a small model on small functions, and return its folder"
    texts = [f'def f{i}(x):\n    return x + {i}\n' * 6 for i in range(40)]
    tok = train_tokenizer(texts, 320)
    torch.manual_seed(0)
    cfg = Config(**SIZES, vocab_size=tok.get_vocab_size(), bos_token_id=0, eos_token_id=1)
    model = DeepSeekV3(cfg)
    ids = [t for text in texts for t in (0, *tok.encode(text).ids)]
    rows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for step in range(steps):
        batch = rows[(torch.arange(8) * 7 + step) % len(rows)]
        optimizer.zero_grad()
        model(batch, labels=batch, mtp_weight=0.3).backward()
        optimizer.step()
    model.eval().save_pretrained(folder / 'run', tokenizer=tok)
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
