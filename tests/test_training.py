"Kinds of model that no preset has, through training, saving and loading"
import pytest, torch
from torch.testing import assert_close
from eva.config import Config
from eva.data import Document, train_tokenizer, write_tokens
from eva.interop import load_pretrained, save_pretrained
from eva.model import DeepSeekV3
from eva.train import TrainConfig, Trainer, bits_per_byte, read_metrics

KINDS = dict(tied=dict(tie_word_embeddings=True), all_dense=dict(first_k_dense_replace=2), no_mtp=dict(num_nextn_predict_layers=0),
             two_mtp=dict(num_nextn_predict_layers=2), no_shared=dict(n_shared_experts=0), no_dense=dict(first_k_dense_replace=0),
             plain_query=dict(q_lora_rank=None), odd=dict(moe_intermediate_size=7, hidden_size=31),
             v2=dict(model_type='deepseek_v2', topk_method='group_limited_greedy', scoring_func='softmax', norm_topk_prob=False, n_group=4, topk_group=2))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp8'])
def test_trains_saves_and_loads(tmp_path, kind, precision):
    text = 'if x == 1: y = 2\nelse: y = 3\n'*30
    tok = train_tokenizer([text], 270)
    train, held = (write_tokens(tmp_path/f'{n}.npy', [Document(n, t)], tok) for n, t in [('train', text*3), ('held', text)])
    cfg = Config.preset('mini', **(dict(vocab_size=tok.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, moe_intermediate_size=16) | KINDS[kind]))
    torch.manual_seed(0)
    t = Trainer(DeepSeekV3(cfg), train, held, TrainConfig(steps=25, batch_size=4, micro_batch=3, seq_len=16, precision=precision, lr=3e-3), tmp_path/'run')
    before = bits_per_byte(t.model, held, 16)
    t.fit()
    rows = read_metrics(tmp_path/'run'/'metrics.jsonl')
    assert not any(r.get('skipped') for r in rows) and bits_per_byte(t.model, held, 16) < .8*before
    save_pretrained(t.model, tmp_path/'saved', tok)
    back, ids = load_pretrained(tmp_path/'saved'), torch.randint(cfg.vocab_size, (1, 9))
    with torch.no_grad(): assert torch.equal(back(ids), t.model(ids))
    if kind == 'tied': assert back.lm_head.weight is back.model['embed_tokens'].weight
    again = Trainer(DeepSeekV3(cfg), train, held, t.cfg, tmp_path/'run')
    again.resume()
    for a, b in zip(again.opt.masters.values(), t.opt.masters.values()): assert torch.equal(a, b)
