"""How much of a schedule Learning-to-Cache can reuse after its published training, whatever the model.

    python -m benchmarks.l2c_reach        # two minutes on one CPU core

Routers for 56 branches (DiT-XL/2) are trained as `train_router.py --method l2c` trains them, with the
published settings but without a data loss: the regularization alone lowers every logit as fast as it can. The
CUR at the end is therefore an upper bound. It depends on `--groups`.
"""

import torch

from common.columns import aligned
from objectives import update_rows
from router import Router
from training.arguments import L2C_L1
from training.rounds import draw_steps, full_steps
from training.state import RowTraining

NUM_BRANCHES = 100 * 56  # a hundred routers side by side: the mean hardly depends on their random start
TRAIN_STEPS, LR, THRESHOLD = 20_000, 1e-3, 0.1
PUBLISHED = {20: 22.14, 50: 23.71}  # CUR of the routers that its authors published, in per cent
COLUMNS = (
    ("T", lambda row: str(row["num_steps"])),
    ("l1", lambda row: f"{row['l1']:g}"),
    ("groups", lambda row: str(row["groups"])),
    ("updates of a row", lambda row: f"{row['updates']:,.0f}"),
    ("CUR at most", lambda row: f"{100 * row['cur']:.1f} %"),
    ("published", lambda row: f"{PUBLISHED[row['num_steps']]} %" if row["num_steps"] in PUBLISHED else "-"),
)


def reach(num_steps: int, groups: int, train_steps: int = TRAIN_STEPS, seed: int = 0) -> dict:
    """One row of the table: `updates` of a row on average, and the `cur` of the router."""
    steps, l1 = full_steps(num_steps), L2C_L1[num_steps, 256]
    router = Router(num_steps, NUM_BRANCHES, torch.Generator().manual_seed(seed))
    logits = router.logits.detach()
    logits[1::2] = torch.inf
    router.set_logits(logits)
    training = RowTraining(router, LR, torch.device("cpu"), 1, THRESHOLD, l1)
    updates = 0
    for number in range(train_steps):
        rows = [step - 1 for step in draw_steps(seed, number, steps, groups)]
        scores = torch.sigmoid(torch.stack([router.rows[row].detach() for row in rows]))
        update_rows(router, training.optimizer, rows, l1 * scores * (1 - scores))
        updates += len(set(rows))
    facts = {"num_steps": num_steps, "l1": l1, "groups": groups, "updates": updates / len(steps)}
    return facts | {"cur": training.schedule.cur}


def main() -> None:
    torch.set_num_threads(1)
    rows = [reach(num_steps, groups) for num_steps in (20, 50) for groups in (1, 4, 8)]
    print(aligned(rows, COLUMNS), flush=True)


if __name__ == "__main__":
    main()
