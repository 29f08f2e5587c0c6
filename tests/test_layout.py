"A layout in a file: eva_plan and eva_train accept the same, the trainer runs it, a run repeats"

import argparse
import contextlib
import io
import json
import random
from dataclasses import replace

import pytest
import torch.distributed as dist
from sizes import TINY
from torch.testing._internal.distributed.fake_pg import FakeStore

from eva.cli.plan import eva_plan, plan_parser, planned_run
from eva.cli.run_config import apply_run_file, layout_of_run, run_settings
from eva.cli.train import check_ranks_of_run, eva_train, parallel_of
from eva.cli.train_arguments import train_parser
from eva.layout import SCHEDULES, TRAINED_SCHEDULES
from eva.model.initialization import meta_model
from eva.planner.training_cost import plan
from eva.published_families import FAMILIES
from eva.trainable import layout_of

PACKED = next(name for name, family in FAMILIES.items() if family.packs_experts)


def some_file(rng):
    "Content of a random run file, and the number of its ranks"

    def often(*values):
        "The first value in most cases"
        return values[0] if rng.random() < 0.7 else rng.choice(values)

    layout = dict(
        pp=rng.choice((1, 1, 2, 3)),
        ep=rng.choice((1, 1, 2, 4)),
        tp=often(1, 1, 2),
        cp=often(1, 1, 2),
        schedule=rng.choice(('1f1b', *SCHEDULES)),
        recompute=often('none', 'full', 'selective'),
        fsdp=rng.choice((None, True, False)),
    )
    ranks = layout['pp'] * layout['tp'] * layout['cp'] * layout['ep'] * rng.choice((1, 1, 2))
    ranks = often(ranks, 1, 3, 6)
    model = TINY | dict(
        num_hidden_layers=rng.choice((1, 3, 5, 7)),
        num_nextn_predict_layers=rng.choice((0, 1, 1, 2)),
        num_attention_heads=often(2, 2, 2, 3),
        first_k_dense_replace=rng.choice((0, 1)),
        n_routed_experts=often(4, 4, 4, 6),
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        intermediate_size=often(16, 16, 16, 15),
        tie_word_embeddings=rng.random() < 0.2,
    )
    kind = rng.random()
    if kind < 0.1:
        model |= dict(model_type='deepseek_v32', index_topk=8, index_n_heads=2, index_head_dim=8)
    elif kind < 0.15:
        model |= dict(model_type=PACKED, num_nextn_predict_layers=0)
    training = dict(
        steps=4,
        batch_size=often(24, 8, 12, 6),
        micro_batch=often(1, 2, 3),
        seq_len=often(16, 16, 24, 18),
        precision=rng.choice(('fp32', 'bf16', 'fp16', 'fp8')),
        batch_size_warmup=often(0.0, 0.0, 0.0, 0.5),
        mask_documents=rng.random() < 0.3,
        mtp_batch_ratio=rng.choice((0.25, 0.5, 1.0)),
    )
    file = dict(model=model, training=training, layout=layout, data=dict(vocab_size=64))
    return file, ranks


def sentence(work):
    "What a function returns, and what its ValueError says"
    try:
        return work(), ''
    except ValueError as e:
        return None, str(e)


@contextlib.contextmanager
def ranks_of(world):
    "A process that is the first of many ranks, of which none answers and all seem to"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TORCHELASTIC_RUN_ID', 'test')
        patch.setenv('WORLD_SIZE', str(world))
        patch.setenv('LOCAL_WORLD_SIZE', str(world))
        patch.setattr('eva.distributed.parallel.connect', lambda *args: None)
        dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=world)
        try:
            yield
        finally:
            dist.destroy_process_group()


def built(args):
    "The ranks' strategy with a divided model, as the trainer makes it; its errors are raised"
    cfg, tcfg = run_settings(args)
    parallel = parallel_of(args)
    parallel.wrap(meta_model(cfg), tcfg)
    return parallel


def planned_blocks(parallel, cfg):
    "Blocks of each stage that the trainer made, those of MTP modules included"
    if parallel.pipe is None:
        return [cfg.num_hidden_layers + cfg.num_nextn_predict_layers]
    blocks = [len(o) for o in parallel.pipe.layers]
    return [*blocks[:-1], blocks[-1] + cfg.num_nextn_predict_layers]


@pytest.mark.parametrize('count', [60, pytest.param(800, marks=pytest.mark.slow)])
def test_planner_and_trainer_accept_the_same(count, tmp_path):
    rng = random.Random(count)
    said = {}
    for i in range(count):
        file, world = some_file(rng)
        path = tmp_path / 'run.json'
        path.write_text(json.dumps(file))
        planner = plan_parser().parse_args(['--config', str(path), '--gpus', str(world)])
        found, refused = sentence(lambda: planned_run(planner))
        args = train_parser().parse_args(['--config', str(path)])
        with ranks_of(world):
            by_command = sentence(lambda: (apply_run_file(args), check_ranks_of_run(args)))[1]
            assert by_command == refused, (i, file, world)
            said[refused.partition('=')[0]] = said.get(refused.partition('=')[0], 0) + 1
            selective = file['layout']['recompute'] == 'selective'  # which Parallel cannot be told
            packed = file['model'].get('model_type') == PACKED and world == 1
            if selective or packed:
                continue
            parallel, by_trainer = sentence(lambda: built(args))
            assert bool(by_trainer) == bool(refused), (i, file, world, refused, by_trainer)
            if parallel is not None:
                cfg, lay, tcfg = found
                p = plan(cfg, lay, tcfg=tcfg)
                assert not p['planned_only']
                assert replace(layout_of(parallel, tcfg), per_node=lay.per_node) == lay, (i, file)
                assert p['stages'] == planned_blocks(parallel, cfg), (i, file)
    assert said[''] > count / 4
    known = {'gpus', 'ep', 'pp', 'schedule', 'recompute', 'index_topk', 'model_type', 'batch', 'tp'}
    assert len(said.keys() & known) > 5, said


def command(work, *argv):
    "Exit code of a command, what it printed, and its errors"
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = work([str(o) for o in argv])
    return code, out.getvalue(), err.getvalue()


SMALL = (
    '--preset tiny --hidden_size 48 --num_hidden_layers 3 --steps 3 --seq_len 16 --batch_size 2 '
    '--vocab_size 300 --precision fp32 --weight_decay 0.2 --fim 0.5 --data a.txt'
)


def test_a_run_repeats_from_its_file(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text(
        ''.join(f'def f{i}(x):\n    return x + {i}\n' for i in range(999))
    )
    monkeypatch.chdir(tmp_path)
    code, printed, err = command(eva_train, *SMALL.split(), '--print_config')
    assert code == 0 and not (tmp_path / 'runs').exists(), err
    assert command(eva_train, *SMALL.split(), '--out', 'one')[0] == 0
    assert (tmp_path / 'one' / 'run_config.json').read_text() == printed
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    file = '../one/run_config.json'
    code, text, _ = command(eva_train, '--config', file, '--print_config', 'yaml')
    (tmp_path / 'again.yaml').write_text(text)
    code, _, err = command(eva_train, '--config', '../again.yaml', '--out', 'two')
    assert code == 0, err
    for name in ('model.safetensors', 'run_config.json', 'config.json', 'tokenizer.json'):
        one, two = ((tmp_path / o / name).read_bytes() for o in ('one', 'elsewhere/two'))
        assert one == two, name
    # the same command goes on with the run, and another value does not
    resume = '--config', '../again.yaml', '--out', 'two', '--resume'
    assert 'this run is finished' in command(eva_train, *resume)[1]
    code, _, err = command(eva_train, *resume, '--weight_decay', '0.1')
    assert code == 2 and 'not with --weight_decay 0.1 (was: 0.2)' in err
    code, _, err = command(eva_train, *resume, '--hidden_size', '32')
    assert code == 2 and 'not with --hidden_size 32 (was: 48)' in err
    code, out, err = command(eva_plan, '--config', file)
    assert code == 0 and '2 sequences of 16 tokens a step' in out and '1f1b, fp32' in out, err


def test_files_that_are_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'list.json').write_text('[1]')
    (tmp_path / 'cut.json').write_text('{"model": ')
    (tmp_path / 'bytes.yaml').write_bytes(b'\xff\xfe')
    for name, text, said in (
        ('gone.yaml', None, 'gone.yaml: no such file; give '),
        ('list.json', None, 'list.json: holds a list; it must be a JSON object'),
        ('cut.json', None, 'cut.json: not valid JSON'),
        ('bytes.yaml', None, 'bytes.yaml: not UTF-8 text'),
        (
            'a.yaml',
            'model: {hiden_size: 3}',
            'model.hiden_size: no such key; use model.hidden_size',
        ),
        ('a.yaml', 'training: {ep: 2}', 'training.ep: no such key; use layout.ep'),
        ('a.yaml', 'modl: {}', 'a.yaml: modl: no such key; use model'),
        ('a.yaml', 'training: {steps: many}', "training.steps='many': must be an integer"),
        ('a.yaml', 'model: {preset: tiny}\n  x: 1', 'a.yaml: no YAML'),
        ('a.yaml', 'layout: {pp: 0}', 'pp=0: must be a positive integer'),
        ('a.yaml', 'layout: {gpus: 0}', 'gpus=0: must be a positive integer'),
        ('a.yaml', 'layout: {schedule: zb1p}', "schedule='zb1p': planned only"),
        ('a.yaml', 'layout: {recompute: selective}', "recompute='selective': planned only"),
        ('a.yaml', 'training: {steps: -1}', 'steps=-1: must be a positive integer'),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        for work in (eva_train, eva_plan):
            code, out, err = command(work, '--config', name)
            assert (code, out) == (2, ''), (name, text, out, err)
            assert err.count('\n') == 1 and said in err, (work.__name__, err)
    assert not (tmp_path / 'runs').exists()


def test_every_field_is_an_option():
    from dataclasses import fields

    from eva.config import Config
    from eva.training.config import TrainConfig

    options = {o.dest: o for o in train_parser()._actions}
    for field in (*fields(Config), *fields(TrainConfig)):
        if field.name not in ('bos_token_id', 'eos_token_id'):  # of the tokenizer
            assert isinstance(options.get(field.name), argparse.Action), field.name
            assert options[field.name].help, field.name


def test_schedules_accept_the_numbers_that_pytorch_accepts(tmp_path):
    model = TINY | dict(num_hidden_layers=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    for schedule in TRAINED_SCHEDULES:
        for number in (1, 2, 3, 4):
            file = dict(
                model=model,
                training=dict(steps=1, batch_size=number, micro_batch=1, seq_len=16),
                layout=dict(pp=2, schedule=schedule),
            )
            path = tmp_path / 'run.json'
            path.write_text(json.dumps(file))
            args = train_parser().parse_args(['--config', str(path)])
            apply_run_file(args)
            with ranks_of(2):
                refused = sentence(lambda args=args: check_ranks_of_run(args))[1]
                with pytest.MonkeyPatch.context() as patch:  # what does PyTorch say alone?
                    patch.setattr('eva.distributed.parallel.check_trainable', lambda *o: None)
                    by_pytorch = sentence(lambda args=args: built(args))[1]
            assert bool(refused) == bool(by_pytorch), (schedule, number, refused, by_pytorch)


def test_options_of_the_planner_win_over_the_file(tmp_path):
    "A preset replaces the model of the file, and sizes change the defaults that depend on them"
    for text, argv in (
        ('model: {preset: mini, hidden_size: 96}', ['--preset', 'tiny']),
        ('model: {preset: tiny}', ['--pp', '2']),
        ('model: {preset: tiny}', ['--pp', '2', '--fsdp']),
        ('model: {preset: tiny}\nlayout: {gpus: 4, ep: 2}', ['--ep', '4']),
    ):
        path = tmp_path / 'run.yaml'
        path.write_text(text)
        cfg, lay, _ = planned_run(plan_parser().parse_args(['--config', str(path), *argv]))
        run = train_parser().parse_args(['--config', str(path), *argv])
        apply_run_file(run)
        wanted, tcfg = run_settings(run)
        assert cfg == wanted
        run.gpus = lay.gpus
        assert lay == layout_of_run(run, tcfg, lay.gpus), (text, argv)
