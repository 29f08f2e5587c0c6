"The usual loop with DistributedDataParallel or Accelerate: python ddp_loop.py OUT WITH"

import os
import sys
from pathlib import Path

import torch
from sizes import TINY
from torch import distributed as dist

from eva.config import Config
from eva.model.transformer import DeepSeekV3

STEPS = 3
WEIGHT = 0.3


def make_model():
    torch.manual_seed(0)
    return DeepSeekV3(Config.from_preset('mini', vocab_size=64, **TINY)).double()


def make_batches():
    torch.manual_seed(1)
    return torch.randint(2, 64, (STEPS, 4, 12))


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train_alone():
    "Losses and weights of one process that sees whole batches"
    model = make_model()
    optimizer = make_optimizer(model)
    losses = []
    for ids in make_batches():
        loss = model(ids, labels=ids, mtp_weight=WEIGHT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def train_with_ddp():
    dist.init_process_group('gloo')
    model = torch.nn.parallel.DistributedDataParallel(make_model())
    optimizer = make_optimizer(model)
    losses = []
    for ids in make_batches():
        mine = ids.chunk(dist.get_world_size())[dist.get_rank()]
        loss = model(mine, labels=mine, mtp_weight=WEIGHT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses, model.module.state_dict()


def train_with_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = make_model()
    loader = torch.utils.data.DataLoader(make_batches().flatten(0, 1), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model), loader)
    losses = []
    for ids in loader:
        loss = model(ids, labels=ids, mtp_weight=WEIGHT)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), 'mean').item())
    return losses, accelerator.unwrap_model(model).state_dict()


if __name__ == '__main__':
    torch.set_num_threads(1)
    found = dict(ddp=train_with_ddp, accelerate=train_with_accelerate)[sys.argv[2]]()
    if os.environ['RANK'] == '0':
        torch.save(found, Path(sys.argv[1]) / 'found.pt')
    dist.destroy_process_group()
