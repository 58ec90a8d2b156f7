"""The settings of an experiment, and what may stand in them."""

# No `from __future__ import annotations`: ml_collections reads field types at run time.

import dataclasses


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one sentence for the user."""


@dataclasses.dataclass
class Optimizer:
    """How parameters follow gradients.

    Attributes:
      name: 'sgd' (with momentum) or 'adamw'.
      learning_rate: the peak of the schedule.
      momentum: SGD momentum; 0 turns it off.
      nesterov: Nesterov momentum.
      b1: AdamW decay of the first moment.
      b2: AdamW decay of the second moment.
      weight_decay: decay of kernels; biases and normalisation parameters are never decayed. For SGD
        it is added to the gradient, for AdamW it is decoupled.
      clip_norm: largest global norm of a gradient; 0 turns clipping off.
      accumulate: batches whose mean gradient makes one update.
      ema_decay: decay per update of the averaged weights, which are then evaluated; 0 is off.
      freeze: layers whose parameters stay as they are, each with all that is inside it; running
        statistics of normalisation still follow the data, unless `freeze_statistics` has them.
      freeze_statistics: layers whose batch normalisations normalise by their running statistics in
        training too, which stay as they are; each with all that is inside it.
      freeze_random: freeze equally many single parameters drawn at random in place of these layers,
        as a control.
    """

    name: str = 'sgd'
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 5e-4
    clip_norm: float = 0.0
    accumulate: int = 1
    ema_decay: float = 0.0
    freeze: tuple[str, ...] = ()
    freeze_statistics: tuple[str, ...] = ()
    freeze_random: bool = False


@dataclasses.dataclass
class Schedule:
    """The learning rate over training, as a share of its peak.

    Attributes:
      name: 'constant', 'cosine' (to `end`), 'piecewise' (times `factor` at each of `boundaries`) or
        'onecycle' (Smith 2018: cosine up from peak / 25 over `warmup`, cosine down to almost 0).
      warmup: share of all updates over which the rate rises linearly from 0.
      boundaries: shares of all updates at which 'piecewise' multiplies the rate by `factor`.
      factor: that factor.
      end: last rate of 'cosine', as a share of the peak.
    """

    name: str = 'cosine'
    warmup: float = 0.05
    boundaries: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    end: float = 0.0


# The family of PGD, whose members take its options.
_PGD_FAMILY = ('fgsm', 'fgsm_rs', 'bim', 'pgd', 'mi_fgsm', 'ni_fgsm')
ATTACKS = (
    *_PGD_FAMILY,
    'apgd',
    'apgd_dlr',
    'square',
    'fab',
    'deepfool',
    'fmn',
    'carlini_wagner',
    'noise',
    'latent',
    'spatial',
    'autoattack',
    'autoattack_plus',
    'autoattack_rand',
)
NORMS = ('linf', 'l2', 'l1')
THREATS = (*NORMS, 'l0', 'spatial')
# Attacks that project their images, which any threat allows.
PROJECTING = ('fgsm', 'fgsm_rs', 'bim', 'pgd', 'mi_fgsm', 'noise')
# Attacks that can aim at a class, and succeed where they reach it.
AIMING = (*_PGD_FAMILY, 'square', 'fmn', 'carlini_wagner')
TARGETS = ('most_likely', 'least_likely', 'random')
# Attacks whose gradients are averaged over draws of a random model, or that follow none.
DRAWING = (*_PGD_FAMILY, 'apgd', 'apgd_dlr', 'square', 'noise', 'autoattack_rand')


@dataclasses.dataclass
class Evaluation:
    """What `evaluate.py` measures.

    Attributes:
      split: 'test' or 'validation'.
      batch_size: images per batch over all devices (rounded up to a multiple of them); results do
        not depend on it.
      limit: evaluate only the first so many images; 0 means all.
      attacks: attacks to run, of 'fgsm', 'fgsm_rs', 'bim', 'pgd', 'mi_fgsm', 'ni_fgsm', 'apgd',
        'apgd_dlr', 'square', 'fab', 'deepfool', 'fmn', 'carlini_wagner' (l2 only), 'noise' (random
        images of the ball, as a control), 'latent' (moves the activation of `layer`), 'spatial' and
        'autoattack', 'autoattack_plus', 'autoattack_rand'.
      norm: the threat model, 'linf', 'l2' or 'l1'; 'l0' with 'fgsm' to 'mi_fgsm' and 'noise' only;
        'spatial', rotations and translations, with the attack 'spatial' only.
      eps: radii in pixels of [0, 1] (for 'l0' how many pixels may change, for 'spatial' the largest
        rotation in degrees), smallest first. Attacks that look for the smallest perturbation run
        once for all of them.
      shift: largest translation of 'spatial' along each axis, as a share of its length.
      loss: what 'fgsm' to 'ni_fgsm' maximise, 'cross_entropy', 'margin', 'dlr' or
        'scaled_cross_entropy'.
      target: the class that attacks aim at, 'most_likely' or 'least_likely' of those that are not
        the label, or 'random'; empty for any. Only attacks 'fgsm' to 'ni_fgsm', 'square', 'fmn' and
        'carlini_wagner', and images of another model, aim; the report then also has the share of
        images taken for the target.
      layer: name of the layer that 'latent' moves.
      steps: steps of 'bim', 'pgd', 'mi_fgsm', 'ni_fgsm' and 'latent'.
      step_size: their step as a share of eps; 0 means 2.5 / steps for 'pgd' and 'latent', 1 / steps
        for others, and in 'l0' a step that brings the steepest pixels to their bounds.
      restarts: runs of 'pgd', 'apgd', 'fab', 'square' and 'latent' from different random starts,
        and random images of 'noise'.
      auto_steps: steps of 'apgd', 'fab', 'fmn' and of AutoAttack.
      search_steps: steps of 'deepfool' and of each search of 'carlini_wagner'; 0 means 50 and 1000.
      queries: forward passes of 'square' and of AutoAttack's.
      draws: of a random model (`attacks.random_forward`), over how many draws 'fgsm' to 'ni_fgsm',
        'apgd' and 'apgd_dlr' average each gradient, and the diagnosis of masking its own;
        'autoattack_rand' has its own number.
      examples: images in the example grid.
      masking_images: on how many first images to look for gradient masking, where there are
        attacks: in `norm`, at each radius of `eps`, with PGD of `steps` and `restarts` and at most
        500 of `queries`; 0 turns it off.
    """

    split: str = 'test'
    batch_size: int = 256
    limit: int = 0
    attacks: tuple[str, ...] = ('fgsm', 'pgd')
    norm: str = 'linf'
    eps: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    shift: float = 0.1
    loss: str = 'cross_entropy'
    target: str = ''
    layer: str = 'head:in'
    steps: int = 20
    step_size: float = 0.0
    restarts: int = 1
    auto_steps: int = 100
    search_steps: int = 0
    queries: int = 5000
    draws: int = 1
    examples: int = 8
    masking_images: int = 128


MEASURES = (
    'statistics',
    'sensitivity',
    'influence',
    'ablation',
    'targeting',
    'input_gradients',
    'attack',
    'filtering',
    'network_filtering',
)


@dataclasses.dataclass
class Neurons:
    """What `evaluate.py` measures of single neurons.

    Attributes:
      measures: of 'statistics', 'sensitivity', 'influence', 'ablation', 'targeting',
        'input_gradients', 'attack', 'filtering' (of the kernel behind each layer) and
        'network_filtering' (of all kernels with the same thresholds, from -1 to 1); none leaves the
        section out. Sensitivity brings statistics with it, targeting ablation, and the attack
        through single neurons both of the first. The last three take longer than all others: the
        attack `attack_neurons` times as long as PGD of as many steps, and filtering runs the model,
        and FGSM on it, 3 times for each of its thresholds.
      layers: names of layers, as of `neurosens.layers`; by default the first convolution
        (behind its nonlinearity) and the input of the last layer.
      unit: 'channel' (a neuron is a channel) or 'unit' (every entry of an activation is one).
      statistics_splits: splits over all of whose images statistics are taken, such as ('train',
        'test') in the paper; empty for the images that are measured.
      limit: measure on the first so many images; 0 means all.
      batch_size: images per batch over all devices; results do not depend on it.
      chunk: neurons at once for each image, which bounds memory; 0 means a measured default.
      method: how Delta is computed, 'auto', 'closed_form', 'first_order' or 'exact'.
      direction: direction of its derivatives, 'auto', 'forward' or 'reverse'.
      search_limit: largest change that 'exact' tries, in units of the activation; 0 means 100 times
        the largest activation of the layer for each image.
      ranking: the score of Delta that ranks neurons for `sensitivity_rank` and for attacks through
        the easiest, 'scaled' (the paper's (Delta - mean) / std), 'absolute' or 'scaled_absolute'.
      score: output whose derivative influence multiplies, 'logit' or 'probability'.
      front: neurons of the largest mean influence that are called front neurons.
      tail: neurons of the smallest, signed one that are called tail neurons.
      ablation: what removes a neuron, 'activation' (its value becomes 0) or 'weights' (the filter
        and bias it comes from do, in front of a normalisation).
      fragile: rule by which ablation calls a neuron fragile: response above the 'mean', the
        'median', 'zero', or a number such as '0.01'.
      eps: linf radius of the FGSM attack behind targeting and attacked ablation, in pixels of
        [0, 1]; 0 means the largest of `evaluation.eps` where that is of linf, else 0.1.
      probes: random directions for input gradients; 0 means exact gradients, neuron by neuron.
      thresholds: thresholds of each filtering sweep.
      attack_norm: norm of the attack through single neurons, 'l2' (the paper's), 'linf' or 'l1'.
      attack_eps: its radius, in pixels of [0, 1].
      attack_steps: its steps for each neuron.
      attack_neurons: how many of each image's easiest neurons it goes through.
      attack_start: where it begins, 'clean' (the paper's) or 'random'.
      attack_restarts: its runs for each neuron, which differ by a random start.
      attack_weight: weight of the neuron's own distance from its target, 10 in the paper.
      attack_keep: which iterate it keeps, 'misclassified' or 'loss' (the paper's: that of largest
        cross-entropy, even where only another is misclassified).
      straight_layer: name of a layer that it takes to have the gradient of the identity, such as
        the last ReLU of a residual network; empty for none.
      agreement_top: neurons that matter most, whose overlap between measures is reported; 0 means
        a tenth of the layer's.
      top: most sensitive neurons that are shown with their images.
    """

    measures: tuple[str, ...] = MEASURES[:-3]
    layers: tuple[str, ...] = ()
    unit: str = 'channel'
    statistics_splits: tuple[str, ...] = ()
    limit: int = 500
    batch_size: int = 128
    chunk: int = 0
    method: str = 'auto'
    direction: str = 'auto'
    search_limit: float = 0.0
    ranking: str = 'scaled'
    score: str = 'logit'
    front: int = 1
    tail: int = 5
    ablation: str = 'activation'
    fragile: str = 'mean'
    eps: float = 0.0
    probes: int = 16
    thresholds: int = 25
    attack_norm: str = 'l2'
    attack_eps: float = 0.5
    attack_steps: int = 50
    attack_neurons: int = 16
    attack_start: str = 'clean'
    attack_restarts: int = 1
    attack_weight: float = 10.0
    attack_keep: str = 'misclassified'
    straight_layer: str = ''
    agreement_top: int = 0
    top: int = 5


FRAGILE_RULES = ('mean', 'median', 'zero')
SURROGATES = ('straight_through', 'soft', 'candidates')
# As in `neurosens.data`.
SPLITS = ('train', 'validation', 'test')
PRUNED_BY = (
    'sensitivity',
    'scaled_sensitivity',
    'influence',
    'ablation',
    'ablation_attacked',
    'targeting',
    'targeting_relative',
    'targeting_log',
    'input_gradients',
)
RESPONSES = (
    'accuracy',
    'loss',
    'margin',
    'accuracy_attacked',
    'loss_attacked',
    'margin_attacked',
)


# Settings of a defence that say how it is calibrated.
CALIBRATION = ('options', 'images', 'measure', 'response')


@dataclasses.dataclass
class Defense:
    """A defence that `evaluate.py` puts in front of the model, and how it is tried.

    Attributes:
      name: 'inverse_perturbation', 'rescaling' (compress and amplify), 'pruning', or empty for
        none. The parameters are kept in `defense` of the work directory.
      parameters: where those of an earlier calibration are, such as that directory; empty means to
        calibrate on training images as `options`, `images`, `measure` and `response` say.
      options: settings of that defence, as in `neurosens.defenses.<name>.Settings`.
      images: images of the training split that it is calibrated on; 0 means all.
      measure: what pruning ranks neurons by, 'sensitivity' (median of std / |Delta|),
        'scaled_sensitivity' (the paper's: absolute mean of (Delta - mean) / std where finite, the
        smallest first), 'influence' (mean absolute one), 'ablation' (rise of the loss),
        'ablation_attacked' (the same of images attacked as `neurons.eps` says), 'targeting' (the
        neuron's mean change by that attack), 'targeting_relative' (to its clean activation),
        'targeting_log' (of the logarithm of the change) or 'input_gradients'.
      response: what is lost without a neuron, by which rescaling calls it fragile: 'accuracy',
        'loss' or 'margin', or, as 'accuracy_attacked', 'loss_attacked' or 'margin_attacked', that
        of images attacked as `neurons.eps` says.
      attacks: attacks made on the defended model besides those of `evaluation.attacks`.
      surrogates: whose gradients attacks on inverse perturbation follow besides its exact one:
        'straight_through' ones, those of 'soft' choices, and of each of its 'candidates' alone.
      surrogate_attacks: attacks made with each of these gradients.
      controls: measure what moves of the same size recover, with and without knowledge of the clean
        image or the label; only for inverse perturbation.
    """

    name: str = ''
    parameters: str = ''
    options: dict = dataclasses.field(default_factory=dict)
    images: int = 1000
    measure: str = 'sensitivity'
    response: str = 'accuracy'
    attacks: tuple[str, ...] = ('apgd', 'apgd_dlr', 'square')
    surrogates: tuple[str, ...] = SURROGATES
    surrogate_attacks: tuple[str, ...] = ('pgd',)
    controls: bool = True


@dataclasses.dataclass
class Monitor:
    """What training is watched by at each validation, on the first images held out.

    Attributes:
      images: how many; 0 turns it off, and `validation_size` must be at least as large.
      norm: norm of the PGD attack.
      eps: its radius, in pixels of [0, 1].
      steps: its steps.
      layer: layer whose neurons are watched: sensitivity of the easiest ones, and the share of dead
        ones; empty for none.
      top: how many of its most sensitive neurons.
      probes: random directions, always the same, along which the norm of the Jacobian and the
        activation sensitivity of every nonlinearity are estimated; 0, as it has to be without
        `images`, leaves them out.
      guard: training stops where the PGD accuracy has fallen by more than this share below its best
        (catastrophic overfitting of single-step attacks), such as 0.2; 0 is off.
      choose: the best checkpoint is that of the highest PGD accuracy, not of the highest clean one.
    """

    images: int = 0
    norm: str = 'linf'
    eps: float = 8 / 255
    steps: int = 10
    layer: str = 'head:in'
    top: int = 5
    probes: int = 0
    guard: float = 0.0
    choose: bool = False


@dataclasses.dataclass
class Config:
    """One experiment.

    Attributes:
      dataset: a name of `neurosens.data.names()`.
      data_dir: a TFDS directory; empty means the TFDS default. Not needed for digits.
      validation_size: training examples held out to choose the best checkpoint; 0 means none, and
        the latest checkpoint then is the best.
      augmentation: 'none', 'pad_crop', 'pad_crop_flip' or 'random_resized_crop_flip'.
      model: a name of `neurosens.models.names()`; for `weights` also 'sequential', a plain stack
        that is built from them.
      model_options: options of that model, as in `neurosens.models.options(name)`; for
        'sequential' those of `neurosens.interop.infer`, and for `weights` also `'names'`, the
        layers of the file for those of the model.
      mean: mean of each channel, which the model subtracts from images; empty means that of the
        data set, or, for `weights`, that in the file or else 0.
      std: standard deviation of each channel, which it divides them by, likewise; for `weights`,
        else 1.
      weights: file of a network that was trained in PyTorch, which `evaluate.py` then evaluates in
        place of a training's; `model` may then also be 'sequential' (see `neurosens.interop`).
      weights_key: where in that file, or in a file of `initial_weights`, the state dict lies, where
        it holds several.
      dtype: computation type, 'float32' or 'bfloat16'; parameters are always float32.
      objective: what is minimised, a name of `neurosens.training.OBJECTIVES`.
      objective_options: options of the objective, such as `{'label_smoothing': 0.1}`.
      regularizers: for each regularizer name its options, its `'weight'` (1 by default), and, as
        shares of training, `'start'` (before which the weight is 0) and `'ramp'` (over which it
        then rises linearly), both 0 by default. With `'shared': True` it uses the objective's pass
        over the clean images, in training mode, in place of a pass of its own in evaluation mode;
        with `'attacked': True` it sees the images that the objective's attack found, in place of
        the clean ones: of `multi_norm` with the strategy 'average' those of the last norm alone.
        With `'regularizer': NAME` an entry has a name of its own, and there can be several of a
        kind. Random directions go by the place of an entry, so that a training is resumed with the
        same order.
      initial_weights: work directory of a trained model of the same kind to start from, with a
        fresh optimizer; empty for random weights. Its best checkpoint is taken. Or a file of a
        network of the same kind that was trained in PyTorch, by images of the same `mean` and
        `std`.
      initial_rescaling: directory of a defence 'rescaling' that was calibrated on these weights,
        such as `defense` of that work directory: training starts from the rescaled weights, and
        `optimizer.freeze` with the rescaled layer trains only the rest. Empty for none.
      epochs: passes over the training set.
      steps: training steps (batches); if not 0, it replaces `epochs`.
      batch_size: images per step, over all devices.
      seed: seed of initialisation, data order and augmentation.
      optimizer: see `Optimizer`.
      schedule: see `Schedule`.
      log_every: steps between lines in `metrics.jsonl`.
      gradient_shares: with each line, log how much of the gradient every term of the loss makes;
        costs a program of its own, and then one more pass (with the attack of an adversarial
        objective) and a gradient per term. Only where there are several terms.
      evaluate_every: epochs between validations; each also saves a checkpoint.
      checkpoint_every: steps between further checkpoints; 0 means only at validations.
      keep_checkpoints: latest checkpoints kept, besides the best.
      cpu_devices: XLA devices a CPU is split into; 0 means one per core.
      monitor: see `Monitor`.
      evaluation: see `Evaluation`.
      neurons: see `Neurons`.
      defense: see `Defense`.
    """

    dataset: str = 'digits'
    data_dir: str = ''
    validation_size: int = 0
    augmentation: str = 'none'
    model: str = 'cnn'
    model_options: dict = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    weights: str = ''
    weights_key: str = ''
    dtype: str = 'float32'
    objective: str = 'standard'
    objective_options: dict = dataclasses.field(default_factory=dict)
    regularizers: dict = dataclasses.field(default_factory=dict)
    initial_weights: str = ''
    initial_rescaling: str = ''
    epochs: float = 10.0
    steps: int = 0
    batch_size: int = 128
    seed: int = 0
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    log_every: int = 20
    gradient_shares: bool = True
    evaluate_every: float = 1.0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    cpu_devices: int = 0
    monitor: Monitor = dataclasses.field(default_factory=Monitor)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    neurons: Neurons = dataclasses.field(default_factory=Neurons)
    defense: Defense = dataclasses.field(default_factory=Defense)


GROUPS = ('optimizer', 'schedule', 'monitor', 'evaluation', 'neurons', 'defense')
# Settings that change neither parameters nor metrics; they may differ when training is resumed.
FREE_KEYS = ('data_dir', 'keep_checkpoints', 'checkpoint_every', 'evaluation', 'neurons', 'defense')
