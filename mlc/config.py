"""Every setting of a run: one flat dataclass. `mlc/flags.py` reads it from YAML files and the command line.

The text under a field is its `--help`; the banners are its help groups. Names and meanings are timm's where timm has
the flag. Durations are written `2ep`, `500st` or `10000ex` (epochs, optimizer steps, examples); a bare number counts
epochs. Only checkpoints may hang on the wall clock: `10min`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from mlc.config_rules import RECOMPUTED as RECOMPUTED
from mlc.config_rules import flag as flag
from mlc.config_rules import impossible
from shards.console import UserError


@dataclass(kw_only=True)
class Config:
    # ---- Data ----
    data: list[str] = field(default_factory=list)
    """folder made by `mlc pack` or `mlc index`, or its http(s)://, s3:// or hf:// URL; may be repeated, with shares:
    --data A --data B:0.3 draws 30 % of the samples from B; `pseudo:FILE` of `mlc pseudo` after the first"""
    train_split: str = "train"
    """split to train on"""
    val_split: str = "val"
    """split of the first --data to evaluate on while training; '' for none"""
    fold: int | None = None
    """validate on this fold of the training split and train on the others (`mlc pack --folds`)"""
    where: str = ""
    """train on the rows for which this is true: fold != 0 and (n_labels > 1 or "cat" in labels)"""
    drop_rows: str = ""
    """file of image ids or keys not to train on: a CSV with a column ImageID, or one a line"""
    sampler: str = "uniform"
    """how often each sample comes: `uniform` once an epoch; `log-freq`, `sqrt-freq`, `class-balanced`: a class is drawn
    first, by log(1 + n), sqrt(n) or 1 of its n samples; `weights:weight`: by that column of the index"""
    oversample: list[str] = field(default_factory=list)
    """CLASS=K: the samples of this class come K times an epoch; may be repeated"""
    hard_mining: float = 0.0
    """share of the samples of the first --data that come once more in each epoch: those with the largest losses in the
    epoch before, in the first epoch any (docs/data-work.md)"""
    hard_list: str = ""
    """--hard-mining: choose them once and for all, by the errors of these predictions of the training split (out of
    fold, by models that did not see them)"""
    shuffle: str = "global"
    """`global`, or `block:N`: reads stay inside 8 blocks of N neighbouring samples at a time, for shards far away"""
    workers: int = 4
    """processes that decode images, per device; 0 decodes in the training process"""
    check_crc: bool = True
    """compare each image with its crc32 when it is read"""
    cache_dir: str = ""
    """keep whole shards of a URL or a slow disk here; without it images of a URL are read by range requests"""
    cache_gb: float = 100.0
    """size of --cache-dir in GB; the longest unused shards make room"""
    max_bad_samples: int = 10
    """samples that may be unreadable in a run (and as many in an evaluation) before it stops; each is named in the log,
    its place in training taken by a neighbour"""
    log_samples: str = ""
    """write one JSON line per step to this file: the keys of the global batch in order, a checksum of each augmented
    image, how and with which others it is mixed, and lambda, its own share"""

    # ---- Model ----
    model: str = "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k"
    """any timm backbone"""
    pretrained: bool = False
    """start from timm's published weights of that name"""
    pretrained_path: str = ""
    """start from these weights of the same backbone: a .safetensors or .pth of timm, of Microsoft (Swin, SwinV2) or of
    Hugging Face (Swin, SwinV2), or a folder with one, RUN/best included"""
    img_size: int = 256
    """pixels of a side of the square the model sees"""
    head: Literal["linear", "extra_linear", "mlp", "ml_decoder", "query2label", "csra", "lstm", "gcn"] = "linear"
    """`linear`: the backbone's own classifier; `extra_linear`: its 1000 logits -> the classes; `mlp`: a hidden layer;
    `ml_decoder`, `query2label`: a query per class looks at the image's places; `csra`: class-wise spatial attention;
    `lstm`, `gcn`: labels inform each other, in a sequence or over their co-occurrence"""
    head_kwargs: dict[str, Any] = field(default_factory=dict)
    """arguments of the head, as k=v (docs/methods.md lists them)"""
    freeze: str = ""
    """what is not trained: `backbone`, or the parameters whose names a regular expression finds"""
    head_bias: Literal["auto", "zero", "prior"] = "auto"
    """first bias of the classifier; `prior`: logit of each class's frequency in the training split; `auto`: that,
    where the classifier has a bias"""
    init_head: str = ""
    """start with the classifier of this run, a linear head on `mlc features` of the same backbone (docs/features.md)"""
    drop: float = 0.0
    """dropout before the classifier"""
    drop_path: float = 0.0
    """stochastic depth, rate at the last block"""
    grad_checkpointing: str = "none"
    """what to compute again in the backward pass instead of keeping it: `all` blocks, least memory and about a third
    slower; `every:K`: every K-th block; `attention`: that of each block (docs/hardware.md)"""
    attention: Literal["fast", "timm"] = "fast"
    """window attention of Swin and SwinV2: ours, or timm's; both read and write the same weights"""
    memory_format: Literal["auto", "contiguous"] = "auto"
    """`auto`: channels last for ConvNets on CUDA, and on a CPU for families that were tried (ResNet, ConvNeXt,
    EfficientNet); contiguous where weights are divided (fsdp2, zero)"""
    compile: bool = False
    """torch.compile the model's blocks: the first step takes minutes, the others less"""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's: `max-autotune-no-cudagraphs` tries several kernels for each product, which takes longer"""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """more arguments of the timm model, as k=v, e.g. --model-kwargs embed_dim=48 'depths=[2,2,2]'"""

    # ---- Features ----
    features: list[str] = field(default_factory=list)
    """train the head alone, on features that `mlc features` made of the data: its file; several stand side by side
    (docs/features.md)"""
    feature_norm: Literal["standardize", "l2", "none"] = "standardize"
    """`standardize`: each feature to mean 0 and deviation 1 over the training samples; `l2`: each encoder's features to
    one length; `none`: as they are"""

    # ---- Captions ----
    text_model: str = ""
    """read the captions too: a Hugging Face encoder by name or folder, RUN/best of a run with captions, or `bigru`
    (docs/captions.md); '' for images alone"""
    fusion: str = "none"
    """how image and caption make one answer: concat, bilinear, early, gated, cross-attention, late; `none` with
    --text-model: the captions alone"""
    fusion_kwargs: dict[str, Any] = field(default_factory=dict)
    """arguments of the fusion, as k=v"""
    text_kwargs: dict[str, Any] = field(default_factory=dict)
    """fields of the encoder's config.json, or arguments of `bigru`, as k=v"""
    text_pool: Literal["cls", "mean", "attention"] = "cls"
    """one vector of a Hugging Face encoder's words: of the first token, their mean, or by learned attention"""
    max_tokens: int = 64
    """captions are cut to so many tokens"""
    clean: list[str] = field(default_factory=list)
    """cleaning of captions: symbols, mentions, punctuation, lower, stopwords, lemmas; several with commas (`mlc stats
    DIR --captions --clean a,b` shows what it does)"""
    word_dropout: float = 0.0
    """probability that a token is hidden"""
    caption_dropout: float = 0.0
    """probability that a caption is left out, so that the model learns to work without one"""
    mix_captions: Literal["embeddings", "join", "off"] = "embeddings"
    """captions of mixed images: their features are mixed as the images are; `join`: one text of all; `off`: each keeps
    its own"""
    group_by_length: bool = False
    """order each global batch by the captions' lengths, so that its micro-batches have less padding; not with batch
    norm"""
    embeddings: str = ""
    """`bigru`: word vectors to start from: a .vec, .txt or .bin file (`mlc embed`), or fasttext, word2vec-skipgram or
    word2vec-cbow, trained on the training captions when the run begins"""
    text_lr_mult: float | Literal["auto"] = "auto"
    """factor of the text encoder's learning rate; `auto`: what gives it a rate of its own under --lr auto, else 1"""
    text_layer_decay: float | None = None
    """layer-wise decay of the text encoder's learning rate"""
    load: str = ""
    """start the image's part from this run, of images with or without captions"""
    load_text: str = ""
    """start the text's part from this run with captions"""
    load_combine: str = ""
    """start from this run of images and captions; where its fusion is another, from its parts"""

    # ---- Batch and length ----
    strategy: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """what the devices divide among them: `ddp` the batch; `fsdp2`, `zero3` weights, gradients and optimizer state too;
    `zero2` gradients and optimizer state; `zero1` optimizer state; `auto` takes the accelerate configuration's"""
    collective_timeout: float = 600.0
    """seconds that a process waits for another before it ends with an error; half an hour until the first step is
    done. Longer than the first process takes to export weights, or any to fetch a batch from far away"""
    batch_size: int | Literal["auto"] = 32
    """samples per device and forward pass; `auto`: the most that fit into memory and divide --global-batch-size"""
    global_batch_size: int | None = None
    """samples per optimizer step over all devices; gradient accumulation follows from it (default: batch size x
    devices)"""
    validation_batch_size: int | None = None
    """samples per device in evaluation (default: the batch size)"""
    epochs: float = 20
    """length of the training in passes over the data; a fraction is allowed"""
    max_steps: int | None = None
    """length of the training in optimizer steps instead"""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """parts of the run, one after the other, each with `for: DURATION` (the last may take the rest) and settings of its
    own: freeze, lr, opt, sched, loss, groups, mixup, ... (docs/methods.md). On the command line as YAML, in quotes"""
    patience: int | None = None
    """end the run, or its stage, after so many evaluations in a row without a better --eval-metric"""
    seed: int = 42
    """one number behind data order, augmentation, initial weights and dropout"""

    # ---- Optimisation ----
    opt: str = "adamw"
    """adamw, sgd (Nesterov), lamb, lion or any other of timm's optimizers"""
    lr: float | Literal["auto"] = "auto"
    """peak learning rate; `auto`: by a rule from optimizer, backbone and batch, said at the start (docs/methods.md)"""
    weight_decay: float = 0.05
    """weight decay, decoupled in AdamW and Lion, part of the gradient in `sgd` (not in `sgdw`); norms, biases, position
    parameters and logit_scale take none"""
    opt_betas: tuple[float, float] = (0.9, 0.999)
    """betas of Adam's relatives"""
    opt_eps: float = 1e-8
    """epsilon of Adam's relatives"""
    momentum: float = 0.9
    """momentum of SGD's relatives"""
    layer_decay: float | Literal["auto"] = "auto"
    """layer-wise decay of the learning rate: each layer learns this factor slower than the one after it; `auto`: 0.8
    for a pretrained image model under --lr auto, else 1"""
    head_lr_mult: float | Literal["auto"] = "auto"
    """factor of the classifier's learning rate; `auto`: 3 for a new one on a pretrained image model under --lr auto,
    else 1"""
    lr_mult: dict[str, float] = field(default_factory=dict)
    """factors of the learning rate, as REGEX=FACTOR; the first expression that is found in a parameter's name counts"""
    wd_mult: dict[str, float] = field(default_factory=dict)
    """factors of the weight decay, as REGEX=FACTOR"""
    clip_grad: float | None = 5.0
    """largest gradient norm over all parameters; `none` for no clipping"""
    sched: Literal["cosine", "linear", "step", "multistep", "onecycle", "constant"] = "cosine"
    """learning rate after the warm-up; `onecycle` is `cosine` with a warm-up of half a wave as well"""
    warmup: str = "10%"
    """duration of the linear warm-up, also as a share of the run: 20%"""
    warmup_lr: float = 0.0
    """learning rate at the start of the warm-up"""
    min_lr: float = 0.0
    """learning rate at the end of `cosine`, `linear` and `onecycle`"""
    decay_every: str = "8ep"
    """`step`: duration between two cuts of the learning rate"""
    decay_at: list[str] = field(default_factory=list)
    """`multistep`: duration until a cut of the learning rate; may be repeated"""
    decay_rate: float = 0.5
    """`step`, `multistep`: factor of each cut"""
    amp_dtype: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """autocast; `auto` takes the launcher's --mixed_precision on a GPU and none on a CPU"""
    model_ema: bool = True
    """keep an exponential moving average of the weights and evaluate it as well"""
    model_ema_decay: float | Literal["auto"] = "auto"
    """decay of the average per optimizer step; `auto`: looks back on a tenth of the run"""
    model_ema_warmup: bool = True
    """start the average with a smaller decay, (1 + step) / (10 + step)"""
    swa_start: str = ""
    """stochastic weight averaging: after this duration the averaged weights are the plain mean of the weights at each
    --swa-every, instead of the moving average"""
    swa_every: str = "1ep"
    """duration between two weights of that mean; one after each step at most"""

    # ---- Loss ----
    loss: Literal["bce", "focal", "asl", "two-way", "zlpr", "db", "soft-fbeta"] = "bce"
    """loss of the logits: binary cross-entropy, focal, asymmetric (ASL), two-way, zero-bounded ranking (ZLPR),
    distribution-balanced (for long-tailed classes), or 1 - soft F-beta of each sample"""
    focal_gamma: float = 2.0
    """`focal`: how much less an easy label counts"""
    focal_alpha: float | None = None
    """`focal`: weight of the positives in [0, 1], 1 - alpha of the negatives (default: no weights)"""
    asl_gamma_neg: float = 4.0
    """`asl`: how much less an easy negative counts"""
    asl_gamma_pos: float = 0.0
    """`asl`: how much less an easy positive counts"""
    asl_clip: float = 0.05
    """`asl`: negatives with a probability below this count nothing"""
    two_way_temp: float = 4.0
    """`two-way`: temperature of the positives. It also compares the samples of one micro-batch in each class, so this
    loss alone depends on --batch-size"""
    db_map: tuple[float, float, float] = (0.1, 10.0, 0.2)
    """`db`: least weight a, slope b and middle m of a + sigmoid(b (ratio - m)), the weight of a label"""
    db_neg_scale: float = 2.0
    """`db`: scale of a negative's logit, above 1 to tolerate it longer; 1 for none"""
    db_bias: float = 0.05
    """`db`: share of the classes' prior logits that is added to the logits"""
    db_gamma: float = 2.0
    """`db`: how much less an easy label counts; 0 for the loss of the paper's formula"""
    fbeta: float = 1.0
    """`soft-fbeta`: beta, above 1 for more recall"""
    weighted_loss: Literal["none", "effective", "inverse"] = "none"
    """weight of a class, 1 on average: by the effective number of its samples (1 - beta^n) / (1 - beta), or by its
    inverse frequency; 1 for a class without a training sample"""
    weighted_beta: float = 0.999
    """`effective`: beta"""
    pos_weight: Literal["none", "balanced"] = "none"
    """`bce`, `focal`, `asl`: weight of a class's positives, negatives over positives in the training data; 1 for a
    class that no sample or every sample has"""
    pos_weight_max: float = 20.0
    """`balanced`: no weight is above this"""
    pos_weight_power: float = 1.0
    """`balanced`: (negatives / positives) to this power, 0.5 for their square root"""
    groups: list[str] = field(default_factory=list)
    """train on the classes of this group alone; may be repeated (default: all classes)"""
    group_loss: dict[str, str] = field(default_factory=dict)
    """another --loss for the classes of a group, as GROUP=LOSS"""
    group_weight: dict[str, float] = field(default_factory=dict)
    """weight of the losses of a group, as GROUP=WEIGHT (default: 1)"""
    smoothing: float = 0.0
    """label smoothing s of a sigmoid: targets y (1 - s) + s / 2"""
    kd_teacher: list[str] = field(default_factory=list)
    """distil from this run (its best weights) or exported model folder, or this prediction file of the training split
    (`mlc predict --split train`), or `ema`, the run's own averaged weights; several runs are averaged"""
    kd_alpha: float = 0.5
    """share of the distillation loss; the labels keep 1 - alpha"""
    kd_temp: float = 2.0
    """temperature of the distillation"""
    kd_rule: Literal["mean", "max"] = "mean"
    """`mean`: the losses of labels and teacher are averaged by --kd-alpha; `max`: the target is the larger one of label
    and teacher's probability, for labels that are often missing"""
    kd_feature: float = 0.0
    """weight of 1 - cosine between the student's and the teacher's pooled features; 0 is off"""

    # ---- Augmentation ----
    crop: str = "rrc"
    """training crop: `rrc` random resized crop; `squish` the whole image squeezed; `center` the centre square; `pad`
    the whole image between borders; `if-needed:2` a random window where a side exceeds 2 x the size, then squeezed"""
    val_crop: str = "squish"
    """crop in evaluation and prediction: `squish`, `center`, `pad`, or `if-needed:2` with the middle window"""
    crop_pct: float = 1.0
    """`--val-crop center`: side of the crop as a share of the short side"""
    scale: tuple[float, float] = (0.7, 1.0)
    """`rrc`: smallest and largest area of the crop, as shares of the image"""
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """`rrc`: smallest and largest aspect of the crop"""
    hflip: float = 0.5
    """probability of a horizontal flip"""
    vflip: float = 0.0
    """probability of a vertical flip"""
    color_jitter: float = 0.0
    """brightness, contrast and saturation change by up to this share, before --aa; 0 is off"""
    aa: str = ""
    """timm's policy: rand-m9-mstd0.5-inc1, original, v0, 3a, augmix-m5-w4; or `trivial` (TrivialAugment), or the light
    ones of two iMet winners: `imet-first`, `imet-second`"""
    reprob: float = 0.0
    """probability of random erasing"""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """what the erased box is filled with: the mean colour, one random colour, noise"""
    cutout: float = 0.0
    """side of a square that is blanked in every image, as a share of the image's; 0 is off"""
    mixup: float = 0.0
    """alpha of mixup's Beta distribution; 0 is off"""
    cutmix: float = 0.0
    """alpha of cutmix's Beta distribution; 0 is off"""
    splicemix: float = 0.0
    """probability that four samples are replaced by grids of two or four of them, made smaller"""
    mixup_switch_prob: float = 0.5
    """probability of cutmix for a pair where mixup is on as well"""
    mixup_prob: float = 1.0
    """probability that a pair of samples is mixed"""
    mix_labels: Literal["convex", "union"] = "convex"
    """labels of a mixed pair: each sample's by its share of the image, or all of both"""
    mixup_off: str = ""
    """stop mixing after this duration"""

    # ---- Evaluation and checkpoints ----
    eval_every: str = "1ep"
    """duration between evaluations; one more at the end"""
    eval_metric: str = "f1_samples@tuned"
    """the best weights are those with the highest value of this (or the lowest `loss`)"""
    threshold: float = 0.5
    """a class is predicted above this probability (the tuned threshold is reported as well)"""
    zero_division: int = 0
    """what an F1 without true and predicted labels counts, of a sample or a class, 0 or 1, as in scikit-learn; with 0 a
    label predicted for a sample that has none costs nothing (docs/thresholds.md)"""
    checkpoint_every: str = "1ep"
    """duration between checkpoints, also in minutes (10min); one more at the end and at a stop"""
    checkpoint_hist: int = 2
    """checkpoints kept"""
    checkpoint_async: bool = True
    """write checkpoints in the background; costs host memory for a copy of what this process writes"""
    checkpoint_dir: str = ""
    """keep the checkpoints of this run in DIR/NAME instead of the run's folder; DIR may be a URL: s3://bucket/runs"""
    resume: str = ""
    """`auto`: go on from the newest intact checkpoint of this run if there is one; the path of a checkpoint or run:
    start a new run (another --experiment) from there"""
    resume_weights_only: bool = False
    """start at step 0 from the weights (and their average) of --resume PATH"""
    allow_data_change: bool = False
    """go on although the data set, or which samples come how often, is another than the checkpoint's"""

    # ---- Run and log ----
    output: str = "runs"
    """folder of the runs"""
    experiment: str = ""
    """name of the run, its folder below --output (default: model and image size)"""
    dry_run: bool = False
    """build everything, train two steps, write a checkpoint, say shapes, memory and times; nothing is kept"""
    deterministic: bool = False
    """on a GPU: only kernels that give the same bits every time, some of them slower; a CPU's always do"""
    profile: bool = False
    """write a trace of steps 5 to 7 and a table of their ten costliest operators to profile/ in the run"""
    log_interval: int = 50
    """optimizer steps between two lines of the log"""
    log_wandb: bool = False
    """mirror the log to Weights & Biases; WANDB_MODE=offline works"""
    wandb_project: str = "mlc"
    """project at Weights & Biases"""
    wandb_group: str = ""
    """group of runs there"""
    wandb_tags: list[str] = field(default_factory=list)
    """tag there; may be repeated"""
    wandb_mode: Literal["", "online", "offline", "disabled"] = ""
    """instead of WANDB_MODE; `offline` writes to disk for `wandb sync`"""
    wandb_samples: int = 16
    """validation images in a table with their labels and predictions, at each evaluation; 0 for none"""
    wandb_artifacts: bool = False
    """upload the best weights at the end"""
    log_tensorboard: bool = False
    """write the log for TensorBoard, to tensorboard/ in the run (pip install "mlc[tensorboard]")"""

    def __post_init__(self):
        for message in impossible(self):
            raise UserError(message)
