"""The benchmarks that `python -m benchmarks` knows: their commands, and what they need."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from collections.abc import Mapping

# What stands for paths in commands, as reports show them.
WEIGHTS, DATA, OUTPUT, PLOT = '{weights}', '{data_dir}', '{output}', '{plot}'


@dataclasses.dataclass(frozen=True)
class Subject:
    """One benchmark, whose report is a block of the documentation.

    Attributes:
        name: of the subject and of its block.
        module: what Python runs.
        arguments: its command line, with `WEIGHTS`, `DATA`, `OUTPUT` and `PLOT` for paths.
        packages: Python packages beyond those of neurosens that it imports.
        minutes: roughly how long it takes on two cores.
        plot: name of the figure that it draws, or empty.
        devices: what it can run on.
        document: page of the documentation that has its block.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    packages: tuple[str, ...]
    minutes: int
    plot: str = ''
    devices: tuple[str, ...] = ('cpu', 'gpu')
    document: str = 'benchmarks.md'

    def command(self, paths: Mapping[str, str], rounds: int = 0, device: str = '') -> list[str]:
        """Returns the arguments of Python that run it.

        Args:
            paths: by `'weights'`, `'data_dir'`, `'output'` and `'plot'`.
            rounds: in place of its own, where it is timed in rounds.
            device: what to run on, or empty.
        """
        arguments = [argument.format_map(paths) for argument in self.arguments]
        if rounds and '--rounds' in arguments:
            arguments[arguments.index('--rounds') + 1] = str(rounds)
        if device and device in self.devices:
            arguments += ['--device', device]
        return ['-m', self.module, *arguments]

    def shown(self) -> str:
        """Returns the command as documentation shows it."""
        shown = {'weights': 'DIR', 'data_dir': 'DIR', 'output': 'DIR', 'plot': 'FILE'}
        return shlex.join(('python', *self.command(shown)))

    def lacks(self, paths: Mapping[str, str], device: str = '') -> str:
        """Returns a sentence on what it needs and does not have; empty where it has everything.

        Args:
            paths: as for `command`; empty strings are not given.
            device: what to run on, or empty.
        """
        for option, placeholder in (('weights', WEIGHTS), ('data_dir', DATA)):
            if placeholder in self.arguments and not paths[option]:
                return f'It needs --{option}.'
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return (
                f'It needs Python packages that are not installed, {", ".join(missing)}; '
                'requirements-bench.txt and requirements-bench-nodeps.txt have them.'
            )
        if device and device not in self.devices:
            return f'It does not run on a {device}.'
        return ''


def _subjects() -> tuple[Subject, ...]:
    torch, captum = ('torch',), ('torch', 'captum')
    parity = ('torch', 'foolbox', 'torchattacks', 'art')
    real = ('--weights', WEIGHTS, '--data_dir', DATA)
    networks = ('--networks', 'resnet2b', 'lenet5_robust')
    squares = ('--attacks', 'square', 'square-whole', '--seeds', '3')
    single = ('--networks', 'LeNet-5', '--batch_size', '64', '--draws', '30')
    defended = ('lenet5', 'lenet5_robust', 'resnet20')
    reduced = ('--attacks', 'apgd-ce', 'apgd-t', 'square', '--queries', '1000')
    cpu = ('cpu',)

    def attacks(
        subject: str, rounds: int, packages: tuple[str, ...], minutes: int, plot: str = ''
    ) -> Subject:
        timed = ('--rounds', str(rounds)) if rounds else ()
        drawn = ('--plot', PLOT) if plot else ()
        arguments = (subject, *real, *timed, *drawn)
        name, module = f'attacks.{subject}', 'benchmarks.attacks'
        return Subject(name, module, arguments, packages, minutes, plot)

    def neurons(
        subject: str, rounds: int, packages: tuple[str, ...], minutes: int, plot: str = ''
    ) -> Subject:
        timed = ('--rounds', str(rounds)) if rounds else ()
        drawn = ('--plot', PLOT) if plot else ()
        arguments = (subject, *timed, *drawn)
        devices = cpu if subject == 'memory' else ('cpu', 'gpu')
        name, module = f'neurons.{subject}', 'benchmarks.neurons'
        return Subject(name, module, arguments, packages, minutes, plot, devices)

    def training(data_set: str, seeds: int, minutes: int, *options: str) -> Subject:
        arguments = ('--dataset', data_set, '--data_dir', DATA, '--output', OUTPUT)
        arguments += ('--seeds', str(seeds), *options)
        name, module = f'robust_training.{data_set}', 'benchmarks.robust_training'
        return Subject(name, module, arguments, (), minutes, document='results.md')

    def defenses(subject: str, minutes: int, networks: tuple[str, ...], plot: str = '') -> Subject:
        drawn = ('--plot', PLOT) if plot else ()
        arguments = (subject, *real, '--output', OUTPUT, '--networks', *networks, *drawn)
        name = '.'.join(('defenses', subject, *(networks if len(networks) == 1 else ())))
        module = 'benchmarks.defenses'
        return Subject(name, module, arguments, torch, minutes, plot, document='results.md')

    return (
        Subject(
            'training_step',
            'benchmarks.training_step',
            ('--rounds', '8', '--plot', PLOT),
            torch,
            5,
            'training_step.png',
        ),
        Subject(
            'training_step.memory',
            'benchmarks.training_step',
            ('--memory', '--rounds', '6'),
            torch,
            6,
            devices=cpu,
        ),
        Subject('step_profile', 'benchmarks.step_profile', (), (), 1, devices=cpu),
        Subject('convolution', 'benchmarks.convolution', ('--rounds', '8'), torch, 2, devices=cpu),
        Subject('choices', 'benchmarks.choices', ('--rounds', '6'), (), 4, devices=cpu),
        Subject('batch_norm', 'benchmarks.batch_norm', ('--rounds', '25'), (), 2),
        Subject('attack_loop', 'benchmarks.attack_loop', ('--steps', '20', '--rounds', '5'), (), 4),
        attacks('steps', 3, parity, 15, 'attack_steps.png'),
        attacks('overhead', 9, parity, 16),
        attacks('autoattack', 3, parity, 60),
        attacks('neurons', 3, parity, 15),
        attacks('compile', 0, torch, 3),
        Subject(
            'attack_parity.compare',
            'benchmarks.attack_parity',
            ('compare', *real, '--output', OUTPUT, '--starts', 'same', *networks),
            parity,
            120,
        ),
        Subject(
            'attack_parity.square',
            'benchmarks.attack_parity',
            ('compare', *real, '--output', OUTPUT, '--networks', 'resnet2b', *squares),
            parity,
            20,
        ),
        Subject(
            'attack_parity.smallest',
            'benchmarks.attack_parity',
            ('smallest', *real),
            parity,
            60,
        ),
        Subject(
            'attack_parity.projecting',
            'benchmarks.attack_parity',
            ('smallest', *real, '--searches', 'fmn, projecting l2'),
            parity,
            5,
        ),
        Subject(
            'attack_parity.published',
            'benchmarks.attack_parity',
            ('published', *real),
            (*parity, 'tensorflow_datasets'),
            30,
        ),
        Subject(
            'regularizers.steps',
            'benchmarks.regularizers',
            ('steps', '--rounds', '4', '--plot', PLOT),
            torch,
            6,
            'regularizer_steps.png',
        ),
        Subject(
            'regularizers.variance',
            'benchmarks.regularizers',
            ('variance', *single, '--rounds', '3', '--plot', PLOT),
            (),
            4,
            'estimators.png',
        ),
        Subject('regularizers.memory', 'benchmarks.regularizers', ('memory',), torch, 6),
        neurons('delta', 9, captum, 5),
        neurons('input_gradients', 5, captum, 8),
        neurons('probes', 20, (), 2),
        neurons('logit_gradients', 15, captum, 6),
        neurons('few_neurons', 15, (), 2),
        Subject(
            'neurons.ablation',
            'benchmarks.neurons',
            ('ablation', '--images', '10000', '--rounds', '2'),
            captum,
            22,
        ),
        neurons('memory', 0, (), 2, 'ablation_memory.png'),
        neurons('scaling', 4, (), 4, 'neuron_scaling.png'),
        Subject('memory', 'benchmarks.memory', (), (), 3),
        Subject(
            'scaling',
            'benchmarks.scaling',
            ('--rounds', '5', '--plot', PLOT),
            (),
            8,
            'device_scaling.png',
            devices=cpu,
        ),
        Subject(
            'published',
            'benchmarks.published',
            real,
            torch,
            3,
            devices=cpu,
            document='from_pytorch.md',
        ),
        training('mnist', 3, 120, *reduced),
        training('cifar10', 1, 95, *reduced),
        *(
            defenses('defended', 40, (network,), f'defense_shifts_{network}.png')
            for network in defended
        ),
        *(
            defenses('curves', 20, (network,), f'defense_curves_{network}.png')
            for network in defended
        ),
        defenses('fragile', 10, defended),
    )


SUBJECTS = {subject.name: subject for subject in _subjects()}


def chosen(names: list[str] | None) -> list[Subject]:
    """Returns the subjects of some names, in the order of the registry; all for None.

    Raises:
        ValueError: there is no such subject.
    """
    unknown = [name for name in names or () if name not in SUBJECTS]
    if unknown:
        raise ValueError(
            f'There is no subject {", ".join(map(repr, unknown))}; there are {", ".join(SUBJECTS)}.'
        )
    return [subject for subject in SUBJECTS.values() if names is None or subject.name in names]
