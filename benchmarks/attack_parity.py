"""Do our attacks find what their PyTorch originals find? Robust accuracy, image by image.

    python -m benchmarks.attack_parity compare --weights DIR --data_dir DIR --output DIR
    python -m benchmarks.attack_parity smallest --weights DIR --data_dir DIR
    python -m benchmarks.attack_parity published --weights DIR --data_dir DIR

`compare` runs both sides with equal budgets on the first test images and keeps what every run found
in the output folder, so that an interrupted comparison goes on where it stopped. Random attacks
differ from seed to seed: how much torchattacks differs from itself is the yardstick for how much we
may differ from it. With `--starts same` Auto-PGD of both sides, whose starts are all that is random
in it, begins at the same points, and PGD at the images, so that only rounding is left to make
outcomes differ. Attack `square-whole` is Square against that of torchattacks with windows that may
reach the last row and column of an image, as ours do and its own do not. `smallest` compares the
perturbations found by attacks that look for the smallest one with those of foolbox. `published`
repeats figures published with the weights.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.attack_settings import ATTACKS, ENSEMBLE, Setting
from neurosens import attacks, parallel
from neurosens.forward import LinenForward

if TYPE_CHECKING:
    from benchmarks import published

# Attacks without random decisions but their starts, which they draw.
_FROM_STARTS = ('apgd-ce', 'apgd-dlr', 'apgd-t')
_SETTINGS = {
    ('lenet5_robust', 'linf'): 0.3,
    ('lenet5_robust', 'l2'): 2.0,
    ('resnet2b', 'linf'): 2 / 255,
    ('resnet2b', 'l2'): 0.25,
    ('resnet20', 'linf'): 0.5 / 255,
    ('resnet20', 'l2'): 0.1,
}
_TITLES = {
    'lenet5': 'LeNet-5',
    'lenet5_robust': 'LeNet-5 (PGD-trained)',
    'resnet2b': 'ResNet-2B',
    'resnet20': 'ResNet-20',
}
_ATTACK_TITLES = {
    'pgd': 'PGD',
    'apgd-ce': 'Auto-PGD, cross-entropy',
    'apgd-dlr': 'Auto-PGD, DLR',
    'apgd-t': 'Auto-PGD, targeted',
    'fab-t': 'FAB, targeted',
    'square': 'Square',
    'square-whole': 'Square, windows up to every border on both sides',
    'autoattack': '**AutoAttack**',
}
# On unknown parts of the test images.
_PUBLISHED = {'lenet5_robust': '6.8 % broken', 'resnet2b': '54.82 % robust'}
_BATCH = 250


def _title(name: str, norm: str) -> str:
    """Such as `'ResNet-2B, linf 2/255'`."""
    eps = _SETTINGS[name, norm]
    fraction = norm == 'linf' and eps < 0.1
    return f'{_TITLES[name]}, {norm} {f"{eps * 255:g}/255" if fraction else f"{eps:g}"}'


def batches(total: int) -> Iterator[slice]:
    """Yields slices of the images, all of one size."""
    for start in range(0, total, _BATCH):
        yield slice(start, start + _BATCH)


def _replicated(pair: published.Published) -> Any:
    """Variables of a network on all devices."""
    return parallel.replicate(harness.mesh(), jax.tree.map(jnp.asarray, pair.variables))


def robust_ours(
    pair: published.Published,
    attack: str,
    setting: Setting,
    seed: int,
    x: np.ndarray,
    y: np.ndarray,
) -> np.ndarray:
    """Returns which images one of our attacks leaves classified correctly."""
    mesh, variables = harness.mesh(), _replicated(pair)
    threat = attacks.Threat(setting.norm, setting.eps)
    key = jax.random.key(seed)
    if attack != 'pgd':
        result = attacks.autoattack(
            pair.forward,
            variables,
            x,
            y,
            key,
            threat=threat,
            attacks=(attack,),
            steps=setting.steps,
            queries=setting.queries,
            batch_size=_BATCH,
            mesh=mesh,
        )
        return ~result.success
    found = []
    for rows in batches(len(x)):
        images, labels, index = parallel.shard(
            mesh, (x[rows], y[rows], np.arange(rows.start, rows.stop))
        )
        result = attacks.pgd(
            pair.forward,
            variables,
            images,
            labels,
            key,
            threat=threat,
            steps=setting.pgd_steps,
            step_size=setting.step_size,
            start=setting.pgd_start,
            index=index,
        )
        found.append(~np.asarray(result.success))
    return np.concatenate(found)


def robust_from_starts(
    pair: published.Published,
    attack: str,
    setting: Setting,
    seed: int,
    x: np.ndarray,
    y: np.ndarray,
    *,
    draws: np.ndarray,
) -> np.ndarray:
    """Returns which images our Auto-PGD leaves classified correctly from the starts of `draws`."""
    mesh, variables = harness.mesh(), _replicated(pair)
    robust = []
    for part in batches(len(x)):
        starts = _starts(x[part], np.broadcast_to(draws, x.shape)[part], setting.eps)
        images, labels, starts = parallel.shard(mesh, (x[part], y[part], starts))
        run = functools.partial(
            attacks.apgd,
            pair.forward,
            variables,
            images,
            labels,
            jax.random.key(seed),
            threat=attacks.Threat(setting.norm, setting.eps),
            steps=setting.steps,
            loss='cross_entropy' if attack == 'apgd-ce' else 'dlr',
            start=starts,
            first_rises=True,
        )
        targets: Sequence[jax.Array | None] = [None]
        if attack == 'apgd-t':
            targets = _targets(pair.forward, variables, images, labels)
        found = [np.asarray(run(target=target).success) for target in targets]
        robust.append(~np.any(found, axis=0))
    return np.concatenate(robust)


def _draws(attack: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers from 0 to 1 of which both sides make their starts.

    One for each image; for targeted attacks one for all, since torchattacks leaves out those that
    have fallen, target by target, and others would go to different images on both sides.
    """
    return np.random.default_rng(seed).random(shape[attack == 'apgd-t' :], np.float32)


def compare(arguments: argparse.Namespace) -> None:
    """Runs what is missing and reports everything asked for."""
    # Imported here, as below: command lines are read without PyTorch.
    from benchmarks import published, torch_device, torch_parity

    on = torch_device.start()
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, norm in itertools.product(arguments.networks, arguments.norms):
        pair = published.load(name, arguments.weights)
        pair.network.to(on)
        x, y = published.images(pair.data_set, arguments.data_dir, arguments.images)
        start = 'random' if arguments.starts == 'own' else 'clean'
        setting = Setting(norm, _SETTINGS[name, norm], batch_size=_BATCH, pgd_start=start)
        title = _title(name, norm)
        for attack in arguments.attacks:
            found: dict[str, list[np.ndarray]] = {'ours': [], 'theirs': []}
            for seed, side in itertools.product(range(arguments.seeds), found):
                # An image withstands the ensemble if it withstands all parts.
                withstood = np.ones(len(x), bool)
                for part in ENSEMBLE if attack == 'autoattack' else (attack,):
                    given = arguments.starts == 'same' and part in _FROM_STARTS
                    draws = {'draws': _draws(part, x.shape, seed)} if given else {}
                    if side == 'theirs':
                        run = functools.partial(torch_parity.withstood, pair.network)
                    else:
                        run = functools.partial(robust_from_starts if given else robust_ours, pair)
                    # Windows of ours reach every border anyway.
                    own = part.removesuffix('-whole') if side == 'ours' else part
                    find = functools.partial(run, own, setting, seed, x, y, **draws)
                    stem = f'{name}_{norm}_{own}_{side}_{seed}'
                    decides = (setting, arguments.images, arguments.starts)
                    make = functools.partial(_timed, find, stem)
                    withstood &= np.array(harness.kept(folder, stem, decides, make))
                found[side].append(withstood)
            rows.append((title, _ATTACK_TITLES[attack], *_compared(**found)))
            title = ''
    header = ('Network', 'Attack', 'ours', 'torchattacks', 'difference', 'same outcome')
    if arguments.seeds > 1:
        header = (*header, 'torchattacks with itself')
    starts = {
        'own': 'both sides draw their own starts',
        'same': 'Auto-PGD of both sides begins at the same points, PGD at the images',
    }[arguments.starts]
    definition = (
        f'Robust accuracy of the first {arguments.images:,} test images in per cent, '
        f'seeds: {arguments.seeds}; {starts}.'
    )
    harness.report(arguments, harness.wrapped(definition), harness.markdown_table(header, rows))


def _timed(run: Callable[[], np.ndarray], name: str) -> list[bool]:
    start = time.perf_counter()
    found = run()
    _note(f'{name}: {found.mean():.2%}, {time.perf_counter() - start:.0f} s')
    return found.tolist()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _compared(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[str, ...]:
    """Cells of one row; every run is an array of flags."""
    means = [100 * np.mean(runs) for runs in (ours, theirs)]
    spreads = [100 * np.std([run.mean() for run in runs]) for runs in (ours, theirs)]
    both = [np.mean(one == other) for one, other in itertools.product(ours, theirs)]
    itself = [np.mean(one == other) for one, other in itertools.combinations(theirs, 2)]
    difference = means[0] - means[1]
    return (
        *(
            f'{mean:.2f} ± {spread:.2f}' if itself else f'{mean:.2f}'
            for mean, spread in zip(means, spreads, strict=True)
        ),
        f'{difference:+.2f}' if abs(difference) >= 0.005 else '0.00',
        f'{100 * np.mean(both):.2f}',
        *([f'{100 * np.mean(itself):.2f}'] if itself else []),
    )


def _loaded(
    name: str, arguments: argparse.Namespace, images: int
) -> tuple[published.Published, Any, np.ndarray, np.ndarray]:
    """A network on the devices of both sides, its variables on ours, and test images."""
    from benchmarks import published, torch_device

    pair = published.load(name, arguments.weights)
    pair.network.to(torch_device.start())
    return pair, _replicated(pair), *published.images(pair.data_set, arguments.data_dir, images)


@jax.jit
def _targets(
    forward: LinenForward, variables: Any, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, ...]:
    """The other classes of each image, from the largest logit down, one array for each rank."""
    logits = forward(variables, x)[0]
    others = jnp.where(jax.nn.one_hot(y, logits.shape[-1]) > 0, -jnp.inf, logits)
    order = jnp.argsort(-others, axis=-1)
    return tuple(order[:, rank] for rank in range(logits.shape[-1] - 1))


def _starts(x: np.ndarray, draws: np.ndarray, eps: float) -> np.ndarray:
    """Where Auto-PGD of torchattacks begins if `draws` are its random numbers from 0 to 1."""
    change = 2 * draws - 1
    largest = np.abs(change).max(tuple(range(1, x.ndim)), keepdims=True)
    return np.clip(x + eps * change / largest, 0, 1)


# Attack, norm and our options; `benchmarks.torch_parity` has the same budgets, and says in what the
# last one differs there.
_SMALLEST: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ('deepfool', 'l2', {'steps': 50}),
    ('deepfool', 'linf', {'steps': 50}),
    ('fmn', 'l2', {'steps': 100}),
    ('fmn', 'linf', {'steps': 100}),
    ('fmn', 'l1', {'steps': 100}),
    ('carlini_wagner', 'l2', {'steps': 200, 'searches': 5}),
    ('fmn, projecting', 'l2', {'steps': 100}),
)


def smallest(arguments: argparse.Namespace) -> None:
    """Reports the smallest perturbations found, ours and foolbox's."""
    from benchmarks import torch_parity

    mesh = harness.mesh()
    rows = []
    for name in arguments.networks:
        pair, variables, x, y = _loaded(name, arguments, _BATCH)
        correct = torch_parity.correct(pair.network, x, y)
        images, labels = parallel.shard(mesh, (x, y))
        for attack, norm, options in _SMALLEST:
            if f'{attack} {norm}' not in arguments.searches:
                continue
            start = time.perf_counter()
            result = getattr(attacks, attack.partition(',')[0])(
                pair.forward,
                variables,
                images,
                labels,
                jax.random.key(0),
                threat=attacks.Threat(norm, np.inf),
                **options,
            )
            ours = np.asarray(result.distance)[correct]
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            theirs = torch_parity.smallest(pair.network, attack, norm, x[correct], y[correct])
            theirs_seconds = time.perf_counter() - start
            shares = [np.isfinite(found).mean() for found in (ours, theirs)]
            both = np.isfinite(ours) & np.isfinite(theirs)
            quotient = np.quantile(ours[both] / theirs[both], (0.1, 0.5, 0.9))
            rows.append(
                (
                    _TITLES[name],
                    attack,
                    norm,
                    *(f'{np.median(found):.4g}' for found in (ours, theirs)),
                    *(f'{100 * share:.1f}' for share in shares),
                    f'{quotient[1]:.3f} ({quotient[0]:.3f}-{quotient[2]:.3f})',
                )
            )
            # A run that is stopped leaves what it found in its log.
            _note(f'{rows[-1]}: {seconds:.0f} s, foolbox {theirs_seconds:.0f} s')
    header = ('Network', 'Attack', 'Norm', 'median, ours', 'foolbox', 'found %, ours', 'foolbox')
    definition = (
        f'Sizes of the smallest perturbations found for the correctly classified among {_BATCH} '
        'images, with equal budgets; the last column is the ratio image by image, median and '
        '10-90 % spread.'
    )
    table = harness.markdown_table((*header, 'ours / foolbox'), rows)
    harness.report(arguments, harness.wrapped(definition), table)


def _success_of_correct(
    forward: LinenForward, variables: dict, x: np.ndarray, y: np.ndarray, **options: object
) -> tuple[float, float]:
    """Clean accuracy, and the share of correctly classified images that PGD breaks."""
    mesh = harness.mesh()
    variables = parallel.replicate(mesh, jax.tree.map(jnp.asarray, variables))
    logits = jax.jit(lambda variables, x: forward(variables, x)[0])
    correct, broken = [], []
    for rows in batches(len(x)):
        images, labels, index = parallel.shard(
            mesh, (x[rows], y[rows], np.arange(rows.start, rows.stop))
        )
        correct.append(np.asarray(logits(variables, images).argmax(-1) == labels))
        attack = functools.partial(attacks.pgd, forward, variables, images, labels)
        broken.append(np.asarray(attack(jax.random.key(0), index=index, **options).success))
    right, fooled = np.concatenate(correct), np.concatenate(broken)
    return float(right.mean()), float(fooled[right].mean())


def figures(arguments: argparse.Namespace) -> None:
    """Reports figures beside those that were published with the weights."""
    from benchmarks import published, torch_device, torch_parity

    on = torch_device.start()
    lenet = {'eps': 0.3, 'steps': 40, 'step_size': 0.01, 'random_start': False}
    resnet = {'eps': 2 / 255, 'steps': 40, 'step_size': 0.5 / 255, 'random_start': True}
    rows = []
    for name, options, count in (
        ('lenet5', lenet, 2000),
        ('lenet5_robust', lenet, 2000),
        ('lenet5_robust', lenet, 10_000),
        ('resnet2b', resnet, 2000),
        ('resnet2b', resnet, 10_000),
    ):
        pair = published.load(name, arguments.weights)
        pair.network.to(on)
        # LeNet's images do not tell their original order.
        original = pair.data_set == 'cifar10'
        x, y = published.images(pair.data_set, arguments.data_dir, count, original_order=original)
        accuracy, broken = _success_of_correct(
            pair.forward,
            pair.variables,
            x,
            y,
            threat=attacks.Threat('linf', options['eps']),
            steps=options['steps'],
            step_size=options['step_size'],
            start='random' if options['random_start'] else 'clean',
        )
        theirs = torch_parity.broken(pair.network, x, y, batch_size=_BATCH, **options)
        _note(f'{name}, {count} images: {broken:.2%} broken, torchattacks {theirs:.2%}')
        total = f'all {count:,}' if count == 10_000 else f'first {count:,}'
        rows.append(
            (
                f'{_TITLES[name]}, linf {"0.3" if options is lenet else "2/255"}',
                total,
                f'{100 * accuracy:.2f} %',
                _PUBLISHED.get(name, ''),
                f'{100 * broken:.2f} %',
                f'{100 * theirs:.2f} %',
                f'{100 * accuracy * (1 - broken):.2f} %',
            )
        )
    header = ('Network', 'images', 'clean accuracy', 'published', 'broken of correct')
    definition = (
        'PGD of 40 steps, for LeNet-5 from the image and for ResNet-2B from a random start; '
        'figures were published for an unknown part of the images. The first images are records '
        'of MNIST, and those of the original file of CIFAR-10.'
    )
    header = (*header, 'torchattacks, same images', 'robust accuracy')
    harness.report(arguments, harness.wrapped(definition), harness.markdown_table(header, rows))


_SUBJECTS = {
    'compare': compare,
    'smallest': smallest,
    'published': figures,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('subject', choices=_SUBJECTS)
    parser.add_argument('--weights', required=True, help='folder of the published weights')
    parser.add_argument('--data_dir', required=True, help='directory of TFDS')
    parser.add_argument('--output', default='attack_parity', help='folder of what runs found')
    names = tuple(dict.fromkeys(name for name, _ in _SETTINGS))
    parser.add_argument('--networks', nargs='+', default=names, choices=names)
    parser.add_argument('--norms', nargs='+', default=('linf',), choices=('linf', 'l2'))
    parser.add_argument('--attacks', nargs='+', default=ATTACKS, choices=_ATTACK_TITLES)
    searches = tuple(f'{attack} {norm}' for attack, norm, _ in _SMALLEST)
    parser.add_argument(
        '--searches', nargs='+', default=searches[:-1], choices=searches, help='of `smallest`'
    )
    parser.add_argument('--images', type=int, default=1000, help=f'a multiple of {_BATCH}')
    parser.add_argument('--seeds', type=int, default=1, help='runs of each attack')
    parser.add_argument(
        '--starts', default='own', choices=('own', 'same'), help='of PGD and Auto-PGD'
    )
    harness.add_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Compares and prints."""
    arguments = parse_arguments()
    if arguments.starts == 'same' and 'l2' in arguments.norms:
        raise SystemExit('--starts same is for linf: torchattacks draws others in l2.')
    harness.use_device(arguments.device)
    harness.start_jax(_BATCH)
    _SUBJECTS[arguments.subject](arguments)


if __name__ == '__main__':
    main()
