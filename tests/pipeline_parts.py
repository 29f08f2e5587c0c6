"""What each rank of tests/test_pipeline_parts.py runs: as tests/features.py, with other errors

An error of `PLANTS` is planted where a case names it. A case with `do` of `evaluate` is only
evaluated, with windows of 13 tokens, which do not divide among ranks.
"""

import json

import features
import ranks
import torch
import torch.distributed as dist

import eva.distributed.context_parallel as context_parallel
import eva.distributed.pipeline as pipeline
import eva.distributed.stage_losses as stage_losses
from eva.distributed.parallel import Parallel
from eva.moe.load_balancing import BALANCE_LOSSES

inputs = context_parallel.PartOfWindows.inputs
gradients = pipeline.Pipeline.gradients
init = pipeline.Stage.__init__


def shifted(self, depth=0):
    "The tokens of the rank before this one, at the depths of MTP"
    found = inputs(self, 0)
    return found if not depth else self.tokens[:, depth : depth + self.seq][:, self.positions - 1]


def turned(self, model, index, layers, ranks=None):
    "Later stages take the states to be those of the other end of the group"
    place = ranks.place if index == 0 else ranks.size - 1 - ranks.place
    init(self, model, index, layers, ranks._replace(place=place))


def over_data(self, x):
    "A sum over the ranks with different sequences only"
    dist.all_reduce(x, group=self.data.get_group())
    return x


def loads_over_data(self, meter):
    for count in meter.count.values():
        over_data(self, count)


features.PLANTS |= dict(
    loads_of_one_part=(Parallel, 'loads', loads_over_data),
    next_token_of_other_part=(context_parallel.PartOfWindows, 'inputs', shifted),
    boundary_of_other_ranks=(pipeline.Stage, '__init__', turned),
    balance_of_one_part=(Parallel, 'balance_loss', lambda self, over: BALANCE_LOSSES[over]),
    ends_without_parts=(Parallel, '_both_ends', lambda self: pairs(self)),
    embedding_without_mtp=(stage_losses.LookUp, 'backward', lambda ctx, *grads: (None, None, None)),
)


def pairs(parallel):
    "Groups of the first and the last stage that leave out other parts of the sequences"
    first, *_, last = parallel.mesh.mesh.flatten(1).tolist()
    groups = [dist.new_group(list(pair)) for pair in zip(first, last)]
    return groups[dist.get_rank() % len(first)]


def evaluate(out, case):
    "Evaluate three windows of 13 tokens, of which some count; what each rank found"
    t = ranks.trainer(out / case['name'], parallel=Parallel(**case['parallel']), **case['run'])
    rows = torch.from_numpy(t.held_out.tokens[:42].astype('int64')).view(3, 14)
    found = t.parallel.evaluate_batch(t.model, rows, True, rows[:, 1:] % 3 > 0)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (out / f'{case["name"]}.json').write_text(json.dumps(everyone))


def run(out, case):
    (evaluate if case['do'] == 'evaluate' else features.run)(out, case)


if __name__ == '__main__':
    ranks.run_cases(run)
