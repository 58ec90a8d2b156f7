"""Do our attacks find what their PyTorch originals find? Robust accuracy, image by image.

    python -m benchmarks.attack_parity compare --weights DIR --data_dir DIR --output DIR
    python -m benchmarks.attack_parity smallest --weights DIR --data_dir DIR
    python -m benchmarks.attack_parity published --weights DIR --data_dir DIR

`compare` runs both sides with equal budgets on the first test images and keeps what every run found
in the output folder, so that an interrupted comparison goes on where it stopped. Random attacks
differ from seed to seed: how much torchattacks differs from itself is the yardstick for how much we
may differ from it. `smallest` compares the perturbations found by attacks that look for the
smallest one with those of foolbox. `published` repeats figures published with the weights.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator

import foolbox
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchattacks

from benchmarks import harness, published, torch_attacks
from benchmarks.attack_settings import ATTACKS, ENSEMBLE, Setting
from neurosens import attacks, onednn, parallel
from neurosens.forward import LinenForward

_SETTINGS = {
    ('lenet5_robust', 'linf'): 0.3,
    ('lenet5_robust', 'l2'): 2.0,
    ('resnet2b', 'linf'): 2 / 255,
    ('resnet2b', 'l2'): 0.25,
    ('resnet20', 'linf'): 0.5 / 255,
    ('resnet20', 'l2'): 0.1,
}
_BATCH = 250


def batches(total: int) -> Iterator[slice]:
    """Yields slices of the images, all of one size."""
    for start in range(0, total, _BATCH):
        yield slice(start, start + _BATCH)


def robust_ours(
    pair: published.Published,
    attack: str,
    setting: Setting,
    seed: int,
    x: np.ndarray,
    y: np.ndarray,
) -> np.ndarray:
    """Returns which images one of our attacks leaves classified correctly."""
    mesh = parallel.data_mesh()
    variables = parallel.replicate(mesh, jax.tree.map(jnp.asarray, pair.variables))
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
            index=index,
        )
        found.append(~np.asarray(result.success))
    return np.concatenate(found)


def robust_theirs(
    pair: published.Published,
    attack: str,
    setting: Setting,
    seed: int,
    x: np.ndarray,
    y: np.ndarray,
) -> np.ndarray:
    """Returns which images an attack of torchattacks leaves classified correctly."""
    torch.manual_seed(seed)
    run = torch_attacks.torchattacks_attacks(pair.network, setting, seed)[attack]
    found = []
    for rows in batches(len(x)):
        images, labels = published.torch_images(x[rows]), torch.from_numpy(np.int64(y[rows]))
        correct = pair.network(images).argmax(1) == labels
        still = correct.clone()
        # Only images that are classified correctly are attacked, as in ours.
        adversarial = run(images[correct], labels[correct])
        still[correct] = pair.network(adversarial).argmax(1) == labels[correct]
        found.append(still.numpy())
    return np.concatenate(found)


def compare(arguments: argparse.Namespace) -> str:
    """Runs what is missing and returns a Markdown table of everything asked for."""
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    sides: dict[str, Callable[..., np.ndarray]] = {'ours': robust_ours, 'theirs': robust_theirs}
    rows = []
    for name, norm in itertools.product(arguments.networks, arguments.norms):
        pair = published.load(name, arguments.weights)
        x, y = published.images(pair.data_set, arguments.data_dir, arguments.images)
        setting = Setting(norm, _SETTINGS[name, norm], batch_size=_BATCH)
        for attack in arguments.attacks:
            found: dict[str, list[np.ndarray]] = {'ours': [], 'theirs': []}
            for seed, side in itertools.product(range(arguments.seeds), sides):
                # An image withstands the ensemble if it withstands all parts.
                withstood = np.ones(len(x), bool)
                for part in ENSEMBLE if attack == 'autoattack' else (attack,):
                    file = folder / f'{name}_{norm}_{part}_{side}_{seed}_{arguments.images}.npy'
                    if not file.exists():
                        start = time.perf_counter()
                        np.save(file, sides[side](pair, part, setting, seed, x, y))
                        seconds = time.perf_counter() - start
                        share = np.load(file).mean()
                        print(f'{file.stem}: {share:.2%}, {seconds:.0f} s', flush=True)
                    withstood &= np.load(file)
                found[side].append(withstood)
            rows.append((name, f'{norm} {setting.eps:.4g}', attack, *_compared(**found)))
    header = ('Network', 'Threat', 'Attack', 'ours', 'torchattacks', 'difference')
    header = (*header, 'same outcome', 'torchattacks with itself')
    return harness.markdown_table(header, rows)


def _compared(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[str, ...]:
    """Cells of one row; every run is an array of flags."""
    means = [100 * np.mean(runs) for runs in (ours, theirs)]
    spreads = [100 * np.std([run.mean() for run in runs]) for runs in (ours, theirs)]
    both = [np.mean(one == other) for one, other in itertools.product(ours, theirs)]
    itself = [np.mean(one == other) for one, other in itertools.combinations(theirs, 2)]
    return (
        *(f'{mean:.2f} ± {spread:.2f}' for mean, spread in zip(means, spreads, strict=True)),
        f'{means[0] - means[1]:+.2f}',
        f'{100 * np.mean(both):.2f}',
        f'{100 * np.mean(itself):.2f}' if itself else '-',
    )


# Attack, norm, our options and foolbox's attack with the same budget.
_SMALLEST: tuple[tuple[str, str, dict, Callable[[], object]], ...] = (
    ('deepfool', 'l2', {'steps': 50}, lambda: foolbox.attacks.L2DeepFoolAttack(steps=50)),
    ('deepfool', 'linf', {'steps': 50}, lambda: foolbox.attacks.LinfDeepFoolAttack(steps=50)),
    ('fmn', 'l2', {'steps': 100}, lambda: foolbox.attacks.L2FMNAttack(steps=100)),
    ('fmn', 'linf', {'steps': 100}, lambda: foolbox.attacks.LInfFMNAttack(steps=100)),
    ('fmn', 'l1', {'steps': 100}, lambda: foolbox.attacks.L1FMNAttack(steps=100)),
    (
        'carlini_wagner',
        'l2',
        {'steps': 200, 'searches': 5},
        lambda: foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=200),
    ),
)


def smallest(arguments: argparse.Namespace) -> str:
    """Returns a Markdown table of the smallest perturbations found, ours and foolbox's."""
    orders = {'linf': np.inf, 'l2': 2, 'l1': 1}
    mesh = parallel.data_mesh()
    rows = []
    for name in arguments.networks:
        pair = published.load(name, arguments.weights)
        x, y = published.images(pair.data_set, arguments.data_dir, _BATCH)
        correct = pair.network(published.torch_images(x)).argmax(1).numpy() == y
        variables = parallel.replicate(mesh, jax.tree.map(jnp.asarray, pair.variables))
        images, labels = parallel.shard(mesh, (x, y))
        for attack, norm, options, make in _SMALLEST:
            start = time.perf_counter()
            result = getattr(attacks, attack)(
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
            model = foolbox.PyTorchModel(pair.network, bounds=(0, 1))
            clean = published.torch_images(x[correct])
            target = torch.from_numpy(np.int64(y[correct]))
            _, found, success = make()(model, clean, target, epsilons=None)
            change = (found - clean).detach().flatten(1).numpy()
            theirs = np.linalg.norm(change, orders[norm], axis=1)
            theirs = np.where(success.numpy(), theirs, np.inf)
            print(f'{name} {attack} {norm}: {seconds:.0f} s, ', end='', flush=True)
            print(f'foolbox {time.perf_counter() - start:.0f} s', flush=True)
            shares = [np.isfinite(found).mean() for found in (ours, theirs)]
            both = np.isfinite(ours) & np.isfinite(theirs)
            quotient = np.quantile(ours[both] / theirs[both], (0.1, 0.5, 0.9))
            rows.append(
                (
                    name,
                    attack,
                    norm,
                    *(f'{np.median(found):.4g}' for found in (ours, theirs)),
                    *(f'{100 * share:.1f}' for share in shares),
                    f'{quotient[1]:.3f} ({quotient[0]:.3f}-{quotient[2]:.3f})',
                )
            )
    header = ('Network', 'Attack', 'Norm', 'median, ours', 'foolbox', 'found %, ours', 'foolbox')
    return harness.markdown_table((*header, 'ours / foolbox'), rows)


def _success_of_correct(
    forward: LinenForward, variables: dict, x: np.ndarray, y: np.ndarray, **options: object
) -> tuple[float, float]:
    """Clean accuracy, and the share of correctly classified images that PGD breaks."""
    mesh = parallel.data_mesh()
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


def _broken_by_torchattacks(
    network: torch.nn.Module, x: np.ndarray, y: np.ndarray, options: dict
) -> float:
    """The share of correctly classified images that PGD of torchattacks breaks."""
    torch.manual_seed(0)
    random_start = options.get('start') != 'clean'
    size, steps = options['step_size'], options['steps']
    run = torchattacks.PGD(network, options['threat'].eps, size, steps, random_start)
    broken = []
    for rows in batches(len(x)):
        images, labels = published.torch_images(x[rows]), torch.from_numpy(np.int64(y[rows]))
        correct = network(images).argmax(1) == labels
        adversarial = run(images[correct], labels[correct])
        broken.append((network(adversarial).argmax(1) != labels[correct]).numpy())
    return float(np.concatenate(broken).mean())


def figures(arguments: argparse.Namespace) -> str:
    """Returns a Markdown table of figures that were published with the weights."""
    lenet = {
        'threat': attacks.Threat('linf', 0.3),
        'steps': 40,
        'step_size': 0.01,
        'start': 'clean',
    }
    resnet = {'threat': attacks.Threat('linf', 2 / 255), 'steps': 40, 'step_size': 0.5 / 255}
    rows = []
    for name, options, count in (
        ('lenet5', lenet, 2000),
        ('lenet5_robust', lenet, 2000),
        ('lenet5_robust', lenet, 10_000),
        ('resnet2b', resnet, 2000),
        ('resnet2b', resnet, 10_000),
    ):
        pair = published.load(name, arguments.weights)
        x, y = published.images(
            pair.data_set, arguments.data_dir, count, original_order=pair.data_set == 'cifar10'
        )
        accuracy, broken = _success_of_correct(pair.forward, pair.variables, x, y, **options)
        theirs = _broken_by_torchattacks(pair.network, x, y, options)
        cells = (accuracy, broken, theirs, accuracy * (1 - broken))
        rows.append((name, str(count), *(f'{100 * cell:.2f}' for cell in cells)))
    header = ('Network', 'images', 'clean accuracy', 'broken of correct', 'torchattacks')
    header = (*header, 'robust accuracy')
    return harness.markdown_table(header, rows)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('subject', choices=('compare', 'smallest', 'published'))
    parser.add_argument('--weights', required=True, help='folder of the published weights')
    parser.add_argument('--data_dir', required=True, help='directory of TFDS')
    parser.add_argument('--output', default='attack_parity', help='folder of what runs found')
    names = tuple(dict.fromkeys(name for name, _ in _SETTINGS))
    parser.add_argument('--networks', nargs='+', default=names, choices=names)
    parser.add_argument('--norms', nargs='+', default=('linf',), choices=('linf', 'l2'))
    parser.add_argument('--attacks', nargs='+', default=ATTACKS, choices=ATTACKS)
    parser.add_argument('--images', type=int, default=1000, help=f'a multiple of {_BATCH}')
    parser.add_argument('--seeds', type=int, default=1, help='runs of each attack')
    return parser.parse_args()


def main() -> None:
    """Compares and prints."""
    arguments = parse_arguments()
    parallel.keep_freed_memory()
    parallel.use_cpu_devices(parallel.cpu_device_count(_BATCH))
    onednn.use_onednn()
    torch.set_num_threads(harness.cores())
    print(harness.machine_line(harness.machine()))
    subjects = {'compare': compare, 'smallest': smallest, 'published': figures}
    table = subjects[arguments.subject](arguments)
    print(f'\n{table}')


if __name__ == '__main__':
    main()
