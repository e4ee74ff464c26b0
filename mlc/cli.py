"""`mlc VERB ...`, also `python -m mlc VERB ...`: one table of verbs, each a module with its own `main(argv)`."""

import importlib
import sys

from shards.console import UserError, did_you_mean, run

VERBS = {
    "demo-data": ("shards.demo", "write the demo competition: CSVs and JPEGs"),
    "pack": ("shards.pack", "CSV and images -> WebDataset shards with an index"),
    "index": ("shards.index", "index tars that somebody else wrote"),
    "stats": ("shards.stats", "count classes and captions; --html: a page with samples, copies, leaks"),
    "verify": ("shards.verify", "check every shard against its checksums"),
    "train": ("mlc.published", "train (the same as train.py)"),
    "fit": ("mlc.fit", "from files to the best model and its submission, in the time there is"),
    "kfold": ("mlc.kfold", "train all folds; out-of-fold predictions; mean of the folds"),
    "selftrain": ("mlc.post.selftrain", "rounds of training and pseudo-labelling"),
    "eval": ("mlc.scores", "score a run or a file of predictions; is one better than another?"),
    "report": ("mlc.report.page", "one HTML page about runs: curves, numbers, classes, pictures"),
    "compare": ("mlc.report.compare", "runs side by side in the terminal: metrics, settings, speed"),
    "predict": ("mlc.predict", "predict a split or a folder of images, with test-time augmentation"),
    "tune": ("mlc.tune", "tune what turns probabilities into labels: thresholds and other rules"),
    "submit": ("mlc.submit", "labels of one file of probabilities, by a threshold or a tuned rule"),
    "ensemble": ("mlc.ensemble", "combine predictions: weighted, tuned, greedy, by vote or union"),
    "stack": ("mlc.post.stack", "second-level model over the predictions of several models"),
    "noise": ("mlc.post.noise", "find labels that are likely wrong, from out-of-fold predictions"),
    "pseudo": ("mlc.post.pseudo", "turn the surest predictions into labels to train on"),
    "features": ("mlc.features", "frozen image and text features of a data set, to train a head on"),
    "embed": ("mlc.embed", "train word vectors on captions"),
    "ckpt": ("mlc.ckpt", "list, check, export or delete the checkpoints of a run"),
    "soup": ("mlc.soup", "average the weights of several runs or checkpoints"),
    "plan": ("mlc.plan", "estimate memory, time and checkpoints of a run on any number of GPUs"),
    "sweep": ("mlc.sweep", "train variants x seeds; table and plot of what each gives"),
    "slurm": ("mlc.slurm", "submit a training, a prediction or all folds to Slurm"),
    "recipes": ("mlc.recipes", "list the recipes for `-c`"),
}


def usage() -> str:
    verbs = "\n".join(f"  {verb:<10} {what}" for verb, (_, what) in VERBS.items())
    return f"usage: mlc VERB [flags]   (mlc VERB --help says more)\n\n{verbs}"


def dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from mlc import __version__

        print(f"mlc {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{did_you_mean(verb, list(VERBS))}\n{usage()}")
    return importlib.import_module(VERBS[verb][0]).main(rest)


def main(argv: list[str] | None = None) -> int:
    return run(dispatch, sys.argv[1:] if argv is None else argv)
