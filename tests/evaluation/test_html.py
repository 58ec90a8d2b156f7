"""The page of a report needs no other file, bears every name, and shows what was measured."""

import base64
import dataclasses
import html
import html.parser
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from neurosens import config, data, evaluation, neurons
from neurosens.evaluation import html_page, masking, report_page
from neurosens.evaluation.defense_outcomes import Moves
from neurosens.evaluation.html_page import (
    Code,
    Figure,
    Folded,
    Notes,
    Section,
    Status,
    Table,
    Values,
    page,
)
from neurosens.neurons import tail
from neurosens.neurons.statistics import from_summary, summarize

HOSTILE = """</style></title><script>alert(1)</script>"' onload='x' & &lt; <img src=http://a.b/c>"""
EMPTY = {'meta', 'img'}


class Reader(html.parser.HTMLParser):
    """What a page holds, if its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.headings = [], {}, []
        self._open, self._row, self._text = [], [], ['']
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        assert len(attributes) == len(dict(attributes)), 'an attribute stands twice'
        self.elements.append((tag, dict(attributes)))
        if tag in ('caption', 'td', 'th', 'h1', 'h2', 'h3', 'h4', 'title', 'code'):
            self._text.append('')
        if tag == 'tr':
            self._row = []
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == 'caption':
            self._rows = self.tables.setdefault(self._text.pop(), [])
        elif tag in ('td', 'th'):
            self._row.append(self._text.pop())
        elif tag == 'tr':
            self._rows.append(self._row)
        elif tag in ('h1', 'h2', 'h3', 'h4', 'title', 'code'):
            self.headings.append((tag, self._text.pop()))

    def handle_data(self, data):
        # Of all that is open, since a heading may hold other elements.
        self._text = [text + data for text in self._text]

    @property
    def text(self):
        return self._text[0]

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def check_alone(text):
    """Reads a page and checks what every page has to be."""
    read = Reader(text)
    names = [attributes['id'] for _, attributes in read.elements if 'id' in attributes]
    assert len(names) == len(set(names))
    for attributes in read.attributes('a'):
        assert attributes['href'][0] == '#' and attributes['href'][1:] in names
    for attributes in read.attributes('section'):
        assert attributes['aria-labelledby'] in names
    for tag, attributes in read.elements:
        assert tag not in ('script', 'link', 'iframe', 'object', 'base', 'form')
        assert not any(name.startswith('on') for name in attributes)
        assert tag == 'img' or 'src' not in attributes
    for attributes in read.attributes('img'):
        assert attributes['src'].startswith('data:image/png;base64,')
        assert attributes['alt'] and int(attributes['width']) > 0 < int(attributes['height'])
    assert all(attributes['scope'] in ('col', 'row') for attributes in read.attributes('th'))
    for rows in read.tables.values():
        assert len({len(row) for row in rows}) == 1, 'every row has every column'
    assert read.attributes('html') == [{'lang': 'en'}]
    levels = [int(tag[1]) for tag, _ in read.headings if re.fullmatch(r'h\d', tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    style = text[text.index('<style>') : text.index('</style>')]
    assert 'url(' not in style and '@import' not in style
    return read


def picture(path, size=(30, 20)):
    Image.new('RGB', size, 'red').save(path)
    return path.read_bytes()


# -------------------------------------------------------------------------------- any page


def test_every_block_bears_every_text(tmp_path):
    blocks = [
        HOSTILE,
        Table(
            HOSTILE, [HOSTILE, 'b'], [[HOSTILE, Status(HOSTILE)], ['x', Status('warn', HOSTILE)]]
        ),
        Figure(picture(tmp_path / 'a.png'), HOSTILE, HOSTILE),
        Values([(HOSTILE, HOSTILE, HOSTILE)]),
        Code(HOSTILE),
        Notes(HOSTILE, [HOSTILE]),
        html_page.check_table('checks', [(HOSTILE,) * 4]),
    ]
    whole = page(HOSTILE, blocks, [Section(HOSTILE, [Folded(HOSTILE, blocks), *blocks])])
    read = check_alone(whole)
    assert [tag for tag, _ in read.elements].count('img') == 3
    assert read.attributes('img')[0]['alt'] == HOSTILE
    assert read.text.count(HOSTILE) == 2 + 2 + 1 + 3 * (1 + 5 + 1 + 3 + 1 + 2 + 4)
    assert ('title', HOSTILE) in read.headings and ('code', HOSTILE) in read.headings


def test_what_a_section_leads_with_stands_at_the_top_too():
    sections = [Section('A', ['x']), Section('B', ['y'], [Notes('beware', ['of the dog'])])]
    whole = page('t', ['first'], sections)
    assert whole.index('first') < whole.index('of the dog') < whole.index('</header>')
    assert whole.count('of the dog') == 1
    check_alone(whole)


def test_what_failed_of_a_diagnosis_leads_the_page():
    passed = masking.Check('noise', True, {'noise': 1.0}, 'Noise is weak.')
    failed = masking.Check('steps', False, {'gained': 9.0}, 'More steps find more.')
    unasked = masking.Check('transfer', None, {}, 'There is no other model.')
    for checks, lead in (
        ((passed, unasked), []),
        (
            (passed, failed, unasked),
            [Notes('Signs', ['At linf eps 0.1 and 0.2: More steps find more.'])],
        ),
    ):
        diagnoses = [masking.Diagnosis(checks, 64, 'linf', eps) for eps in (0.1, 0.2)]
        diagnoses.append(masking.Diagnosis((passed,), 64, 'linf', 0.3))
        section = report_page.masking_section('Signs', diagnoses)
        assert list(section.lead) == lead
        assert [table.caption for table in section.blocks[1:]] == [
            f'Checks at linf eps {eps}' for eps in (0.1, 0.2, 0.3)
        ]


def test_what_no_page_can_hold_is_replaced():
    whole = page('a\x00b\x1b', ['undecodable \udcff'], [])
    assert 'a�b�' in whole and 'undecodable �' in whole
    check_alone(whole.encode('utf-8').decode('utf-8'))


def test_sections_are_nested_and_named_apart():
    sections = [
        Section('Ä b', [Section('Same', [Section('deep', ['x'])])]),
        Section('', [Folded('more', [Section('Same', [])])]),
        Section('same 2', ['text']),
    ]
    read = check_alone(page('Title', [], sections))
    names = [attributes['id'] for _, attributes in read.elements if 'id' in attributes]
    assert names == ['b', 'same', 'deep', 'section', 'same-2', 'same-2-2']
    links = [attributes['href'][1:] for attributes in read.attributes('a')]
    assert links == names, 'the contents list every section in order'
    assert [tag for tag, _ in read.headings] == ['title', 'h1', 'h2', 'h3', 'h4', 'h2', 'h3', 'h2']


def test_columns_of_numbers_are_told_from_words():
    rows = [['a', '1.5 (1.2–1.8)', 'closed form', '-'], ['b', '–', '3', '+0.2']]
    read = check_alone(page('t', [Table('c', ['name', 'number', 'words', 'signed'], rows)], []))
    numbers = [attributes.get('class') for attributes in read.attributes('td')]
    assert numbers == ['number', None, 'number'] * 2
    assert read.tables['c'][1:] == rows


def test_checks_say_their_result_in_words():
    checks = [
        ('steps', 'pass', '0.1 %', ''),
        ('transfer', 'warn', '3.0 %', 'Use more steps.'),
        ('ball', 'not run', '', ''),
    ]
    whole = page('t', [], [Section('Diagnostics', [evaluation.check_table('Masking', checks)])])
    _, *rows = check_alone(whole).tables['Masking']
    assert [[row[0], row[1].split(' ', 1)[1]] for row in rows] == [
        ['steps', 'pass'],
        ['transfer', 'warn'],
        ['ball', 'not run'],
    ]
    assert 'class="status warn"' in whole and 'class="status other"' in whole


def test_mistakes_are_named():
    with pytest.raises(ValueError, match='must be a PNG file'):
        page('t', [Figure(b'GIF89a', '', 'x')], [])
    with pytest.raises(TypeError, match='3 is no block'):
        page('t', [3], [])


# ----------------------------------------------------------------------------- the report's page

EPS = (0.1, 0.25)
LAYER = 'a_long_stage_name/' * 9 + '<act>:in'
LOG = [{'step': 5, 'loss': 2.0, 'accuracy': 0.3}, {'step': 9, 'loss': 1.0, 'accuracy': 0.5}]


@pytest.fixture(scope='module')
def report():
    random = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.int32) % 9
    right = random.random(40) < 0.9
    predictions = evaluation.Predictions(
        labels,
        np.where(right, labels, 9).astype(np.int32),
        random.random(40).astype(np.float32),
        np.where(right, 1, -1).astype(np.float32),
    )

    def outcome(attack, eps, strength, **more):
        success = ~right | (random.random(40) < strength * eps)
        images = random.integers(0, 256, (8, 8, 8, 1)).astype(np.uint8)
        attacked = evaluation.Attacked(
            success, np.where(success, -1.0, 1.0), labels, images / np.float32(255), images
        )
        return evaluation.AttackOutcome(attack, 'linf', eps, attacked, **more)

    broken_by = tuple(random.choice(['', 'apgd-ce', 'square', 'clean'], 40).tolist())
    warnings = (f'Square broke images; {HOSTILE}.',)
    outcomes = [outcome(name, eps, s) for name, s in (('fgsm', 1), ('pgd', 3)) for eps in EPS]
    outcomes.append(outcome('autoattack', EPS[1], 4, broken_by=broken_by, warnings=warnings))
    return evaluation.RobustnessReport(data.info('digits'), 'test', predictions, tuple(outcomes))


@pytest.fixture(scope='module')
def neuron_report(report):
    random = np.random.default_rng(1)
    activation = random.random((40, 5)).astype(np.float32)
    delta = random.lognormal(size=(40, 5)).astype(np.float32)
    delta[:9] = np.inf
    layer = evaluation.LayerReport(
        neurons.NeuronLayer(LAYER, (5,), 'unit', 5, None, tail.LayerFacts((5,), True, False)),
        from_summary(summarize(activation)),
        activation,
        'first_order',
        delta,
        np.where(np.isinf(delta), -1, 3).astype(np.int32),
        random.normal(size=(40, 5)).astype(np.float32),
    )
    labels, predictions = report.predictions.labels, report.predictions.predictions
    return evaluation.NeuronReport(
        report.info, 'test', labels, predictions, 'FGSM, linf eps 0.25', (layer,)
    )


MOVES = Moves(
    'static/pgd-linf-0.1',
    {'<defence>': {0.02: 0.5, 0.05: float('nan')}},
    {LAYER: {'front': np.ones(3), 'middle': np.zeros(3), 'tail': np.zeros(0)}},
    {LAYER: {'front': np.full(3, -0.25), 'middle': np.zeros(3), 'tail': np.zeros(0)}},
)


@pytest.fixture(scope='module')
def defended(report):
    success, right = report.outcomes[0].attacked.success, report.predictions.correct
    outcomes = (
        evaluation.DefenseOutcome(
            'static', 'pgd', 'linf', 0.1, success, success & right, undefended=success
        ),
        evaluation.DefenseOutcome('adaptive', 'pgd', 'linf', 0.1, success),
    )
    return evaluation.DefenseReport(
        'inverse_perturbation', {}, report.predictions, report.predictions, outcomes, (MOVES,),
        5, 4.5,
    )  # fmt: skip


FACTS = {
    'workdir': f'runs/{HOSTILE}',
    'step': 1234,
    'config': config.to_dict(
        config.Config(model_options={'features': (4, 8)}, regularizers={'jacobian': {'weight': 1}})
    ),
}
PROVENANCE = {'command': f"python evaluate.py '--workdir=runs/{HOSTILE}'", 'jax': '1.2.3'}


@pytest.fixture(scope='module')
def written(report, neuron_report, defended, tmp_path_factory):
    directory = tmp_path_factory.mktemp('a b') / '<i>"&'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('neurosens.evaluation.plots._DPI', 50)
        files = evaluation.write_neurons(neuron_report, directory)
        other = ('another <model>', neuron_report)
        sections = [
            Section('Diagnostics', [evaluation.check_table('c', [('a', 'pass', '1', 'b')])]),
            evaluation.neuron_section(neuron_report, files, compare=other),
        ]
        of_defense = evaluation.write_defense(defended, directory)
        sections.append(evaluation.defense_section(defended, of_defense))
        files += of_defense
        facts = {**FACTS, **evaluation.neuron_facts(neuron_report)}
        facts.update(evaluation.defense_facts(defended))
        files += evaluation.write(
            report, directory, facts, LOG, sections=sections, provenance=PROVENANCE
        )
    text = (directory / 'index.html').read_text(encoding='utf-8')
    return directory, files, text, check_alone(text)


def test_every_picture_of_the_report_is_in_the_page(written):
    _, files, _, read = written
    pictures = {path.read_bytes() for path in files if path.suffix == '.png'}
    assert len(pictures) >= 11
    shown = [attributes['src'].partition(',')[2] for attributes in read.attributes('img')]
    assert len(shown) == len(pictures)
    assert {base64.b64decode(data) for data in shown} == pictures


def test_the_numbers_are_those_of_the_results(written, report):
    directory, _, _, read = written
    results = json.loads((directory / 'results.json').read_text())
    table = dict(read.tables['The contents of results.json, without the settings'][1:])
    assert {key: json.loads(value) for key, value in table.items()} == {
        key: value for key, value in results.items() if key != 'config'
    }
    (attacks,) = [rows for caption, rows in read.tables.items() if 'under attack' in caption]
    header, *rows = attacks
    assert header == ['attack', *(f'eps {eps}' for eps in EPS)]
    assert [row[0] for row in rows] == ['fgsm', 'pgd', 'autoattack', 'worst of all, for each image']
    expected = {key: (100 * np.array(interval)) for key, interval, _ in evaluation.rows(report)}
    for name, *cells in rows:
        key = name.partition(' ')[0]
        for eps, cell in zip(EPS, cells):
            if (key, eps) == ('autoattack', EPS[0]):
                assert cell == '–', 'what did not run has no accuracy'
                continue
            value, low, high = expected[f'robust_accuracy/{key}-linf-{eps}']
            assert cell == f'{value:.2f} ({low:.2f}–{high:.2f})'
    (classes,) = [rows for caption, rows in read.tables.items() if 'each class' in caption]
    assert [row[0] for row in classes[1:]] == [*'012345678'], 'a class without images has no row'
    value, low, high = expected['class_accuracy/3']
    assert classes[4][2] == f'{value:.2f} ({low:.2f}–{high:.2f})'
    members = report.predictions.labels == 3
    assert classes[4][4].startswith(f'{100 * report.worst_case(EPS[1])[members].mean():.2f} ')
    assert f'{report.predictions.accuracy:.2%}' in read.text
    left = {o.attack: (~o.attacked.success).mean() for o in report.outcomes if o.eps == EPS[1]}
    assert f'strongest: {min(left, key=left.get)}' in read.text


def test_who_broke_what_adds_up(written, report):
    rows = written[3].tables['autoattack-linf-0.25: what broke each image first'][1:]
    broken = report.outcomes[-1].broken_by
    assert sum(int(row[1]) for row in rows) == len(broken)
    assert dict(row[:2] for row in rows)['square'] == str(broken.count('square'))


def test_neurons_are_shown_layer_by_layer(written, neuron_report):
    read = written[3]
    assert ('h3', LAYER) in read.headings
    (layers,) = [rows for caption, rows in read.tables.items() if caption.startswith('Layers.')]
    assert [row[:4] for row in layers[1:]] == [
        [LAYER, name, '5', 'first order'] for name in ('this model', 'another <model>')
    ]
    assert layers[1][5] == '22.50%'
    (top,) = [rows for rows in read.tables.values() if rows[0][0] == 'most sensitive']
    assert len(top) == 1 + 5
    agreement = neuron_report.layers[0].agreement
    (agree,) = [rows for caption, rows in read.tables.items() if caption.startswith('Agreement')]
    assert agree[1] == ['sensitivity', '–', f'{agreement.rho[0, 1]:+.2f}']
    assert agree[2] == ['influence', f'{agreement.overlap[0, 1]:.2f}', '–']


def test_the_page_says_how_to_make_it_again(written):
    read = written[3]
    assert ('code', PROVENANCE['command']) in read.headings
    assert ['jax', '1.2.3'] in read.tables['Made with']
    settings = dict(read.tables['Settings, as --config.KEY=VALUE'][1:])
    assert settings['evaluation.norm'] == 'linf' and settings['seed'] == '0'
    # Options are one setting, whatever is in them.
    assert settings['model_options'] == "{'features': [4, 8]}"
    assert settings['regularizers'] == "{'jacobian': {'weight': 1}}"
    assert f'(step 1234 of runs/{HOSTILE}) classifies ' in read.text


def test_a_defence_has_every_accuracy(written, defended):
    read = written[3]
    assert ('h2', 'Defence: inverse perturbation') in read.headings
    (accuracy,) = [rows for caption, rows in read.tables.items() if 'unless it says' in caption]
    expected = {key: interval.value for key, interval, _ in evaluation.defense_rows(defended)}
    assert {key: text.split()[0] for key, text in accuracy[1:]} == {
        key: f'{100 * value:.2f}' for key, value in expected.items()
    }
    (recovered,) = [rows for caption, rows in read.tables.items() if 'lost of what' in caption]
    fooled = int(defended.outcomes[0].fooled.sum())
    assert recovered[1][1].endswith(f', 0 of {fooled}')
    assert recovered[1][2] == f'0 of {int(defended.undefended.correct.sum()) - fooled}'
    assert ['<defence>', '50.0', '–'] in read.tables[
        f'Recovered, in %, of what {MOVES.attack} fooled, by moves of size rho'
    ]
    assert [LAYER, '+1.000', '+0.000', '–'] in [
        row for rows in read.tables.values() for row in rows
    ]


def test_warnings_stand_at_the_top(written, report):
    _, _, text, read = written
    assert f'autoattack-linf-0.25: {report.outcomes[-1].warnings[0]}' in read.text
    assert text.index('class="notes"') < text.index('<nav')
    titles = [title for tag, title in read.headings if tag == 'h2']
    defense = 'Defence: inverse perturbation'
    assert titles == ['Accuracy', 'Diagnostics', 'Neurons', defense, 'Training', 'Reproduction']


def test_a_page_that_cannot_be_made_leaves_the_former_report(report, tmp_path):
    clean = dataclasses.replace(report, outcomes=())
    evaluation.write(clean, tmp_path, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert 'It was not attacked.' in check_alone(before['index.html'].decode()).text
    with pytest.raises(TypeError, match='no block'):
        evaluation.write(report, tmp_path, {'step': 7}, sections=[Section('x', [3])])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_many_classes_are_folded_away(report, tmp_path):
    names = tuple(f'class {i}' for i in range(40))
    info = dataclasses.replace(report.info, num_classes=40, class_names=names)
    labels = np.arange(40, dtype=np.int32)
    clean = evaluation.RobustnessReport(
        info, 'test', report.predictions._replace(labels=labels), ()
    )
    evaluation.write(clean, tmp_path, {})
    text = (tmp_path / 'index.html').read_text(encoding='utf-8')
    assert '<summary>All 40 classes</summary>' in text
    (rows,) = [rows for caption, rows in check_alone(text).tables.items() if 'class' in caption]
    assert len(rows) == 1 + 40


# ----------------------------------------------------------------------------- a real browser

# Says in the title what the browser made of the page.
PROBE = """<script>
const problems = [];
for (const kind of ['error', 'securitypolicyviolation'])
  addEventListener(kind, event => problems.push([kind, event.message, event.blockedURI]), true);
addEventListener('load', () => {
  const wide = element => element.getBoundingClientRect().right > innerWidth + 1
    && !element.closest('.scroll');
  top.document.title = JSON.stringify({
    problems,
    images: [...document.images].map(image => image.complete && image.naturalWidth),
    fetched: performance.getEntriesByType('resource').map(entry => entry.name.slice(0, 5)),
    width: innerWidth,
    content: document.documentElement.scrollWidth,
    wide: [...document.querySelectorAll('body *')].filter(wide).map(element => element.outerHTML),
    background: getComputedStyle(document.body).backgroundColor,
  });
});
</script>"""


@pytest.fixture(scope='module')
def browse(tmp_path_factory):
    """From arguments and a page to what Chromium, cut off from all networks, prints of it."""
    browser = shutil.which('chromium') or shutil.which('chromium-browser')
    # Some distributions have a script of that name that only says where to get it.
    if browser is None or subprocess.run([browser, '--version'], capture_output=True).returncode:
        pytest.skip('a real browser: install chromium')
    home = tmp_path_factory.mktemp('browser')

    def run(path, *arguments):
        command = [
            browser,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-dev-shm-usage',
            '--no-first-run',
            '--host-resolver-rules=MAP * ~NOTFOUND',
            '--enable-logging=stderr',
            f'--user-data-dir={home}',
            *arguments,
            path.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        messages = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
        assert not messages, 'the console is empty'
        return done.stdout

    return run


def in_frame(text, width):
    """A page with another one as a screen of so many pixels shows it; no window is as narrow."""
    style = f'border:0;width:{width}px;height:900px'
    return f'<!doctype html><title></title><iframe style="{style}" srcdoc="{html.escape(text)}">'


@pytest.mark.parametrize(('width', 'dark'), [(1300, False), (900, True), (360, False)])
def test_a_browser_shows_the_page(written, browse, tmp_path, width, dark):
    _, files, text, _ = written
    options = ['--blink-settings=preferredColorScheme=0'] if dark else []
    policy = html_page._POLICY
    probed = text.replace(policy, f"{policy}; script-src 'unsafe-inline'")
    probed = probed.replace('<body>', f'<body>{PROBE}')
    path = tmp_path / 'page.html'
    path.write_text(in_frame(probed, width), encoding='utf-8')
    dumped = browse(path, *options, '--window-size=1400,1000', '--dump-dom')
    found = json.loads(html.unescape(re.search('<title>(.*?)</title>', dumped)[1]))
    assert found['problems'] == [] and set(found['fetched']) <= {'data:'}
    assert len(found['images']) == sum(path.suffix == '.png' for path in files)
    assert all(found['images'])
    assert found['width'] == width
    assert found['content'] <= width and not found['wide'], 'nothing sticks out'
    assert found['background'] == ('rgb(21, 24, 28)' if dark else 'rgb(255, 255, 255)')


def test_a_browser_opens_the_file_itself(written, browse, tmp_path):
    directory, *_ = written
    shot = tmp_path / 'page.png'
    browse(directory / 'index.html', '--window-size=1000,800', f'--screenshot={shot}')
    with Image.open(shot) as shown:
        assert shown.size == (1000, 800)
        assert len(shown.convert('L').getcolors(256)) > 50, 'an empty page'
