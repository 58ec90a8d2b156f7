"""Command line: `python -m neurosens.data list` and `python -m neurosens.data prepare NAME`."""

import argparse
import sys
from collections.abc import Sequence

from neurosens.data import catalogue, tfds_source
from neurosens.data.prepare import PrepareError, prepare


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments; None for those of the process.

    Returns:
        Exit code: 0, or 2 after one sentence on the standard error output.
    """
    parser = argparse.ArgumentParser(
        prog='python -m neurosens.data', description='Lists and prepares image data sets.'
    )
    commands = parser.add_subparsers(dest='command', required=True)
    preparing = commands.add_parser('prepare', help='download a data set and write it for reading')
    preparing.add_argument('name', metavar='NAME', help=', '.join(catalogue.names()))
    listing = commands.add_parser('list', help='show the data sets and which are prepared')
    for command in (preparing, listing):
        command.add_argument(
            '--data_dir',
            metavar='DIR',
            help='directory of prepared data sets (default: TFDS_DATA_DIR, '
            'else ~/tensorflow_datasets)',
        )
    options = parser.parse_args(arguments)
    if options.command == 'list':
        _list(options.data_dir)
        return 0
    try:
        prepared = prepare(options.name, options.data_dir)
    except (PrepareError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if prepared.directory is None:
        print(f'{options.name} is embedded and needs no preparation')
    elif prepared.created:
        print(f'{options.name} is now prepared in {prepared.directory}')
    else:
        print(f'{options.name} is already prepared in {prepared.directory}')
    return 0


def _list(data_dir: str | None) -> None:
    root = tfds_source.resolve_data_dir(data_dir)
    for name in catalogue.names():
        info = catalogue.info(name)
        shape = 'x'.join(str(side) for side in info.image_shape)
        directory = tfds_source.find_prepared(name, root)
        state = 'embedded' if name == 'digits' else str(directory or 'not prepared')
        print(
            f'{name:<14}{shape:<12}{info.num_classes:>5} classes'
            f'{info.train_size:>9} train{info.test_size:>7} test  {state}'
        )


if __name__ == '__main__':
    sys.exit(main())
