"""Draws the roadmap of every lesson, with its own part lit, and the chain of decisions in 02:
python nbs/images/roadmap.py"""

from pathlib import Path

STAGES = [('02', 'sample'), ('01', 'score'), ('03', 'compare'), ('04', 'update')]
BETWEEN = ['prompts', 'pictures', 'rewards', 'advantages']
BLUE, PALE, INK = '#1f6feb', '#eef3fb', '#1f2328'


def text(x: int, y: int, words: str, size: int, color: str = INK, anchor: str = 'middle') -> str:
    "Some words."
    place = f'x="{x}" y="{y}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{color}">{words}</text>'


def box(x: int, y: int, width: int, height: int, lit: bool) -> str:
    "A rounded rectangle."
    fill = BLUE if lit else PALE
    shape = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="8"'
    return f'<rect {shape} fill="{fill}" stroke="{BLUE}" stroke-width="1.5"/>'


def arrow(*points: tuple[int, int]) -> str:
    "A line through points, with a head at its end."
    path = ' '.join(f'{x},{y}' for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" '
        'marker-end="url(#head)"/>'
    )


def opening(width: int, height: int) -> list[str]:
    "The first lines of a picture: its size, the head of its arrows, a white ground."
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        f'<path d="M0,0 L9,4 L0,8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]


def roadmap(lesson: str) -> str:
    "The loop of DDPO: four stages, what goes from one to the next, and what is around them."
    everything = lesson in ('00', '05')
    frame = BLUE if lesson == '05' else '#c9d1d9'
    parts = [
        *opening(860, 176),
        f'<rect x="8" y="26" width="700" height="142" rx="10" fill="none" stroke="{frame}" '
        'stroke-width="2" stroke-dasharray="6 4"/>',
        text(18, 18, '00 on one page, 05 in full: the loop', 13, anchor='start'),
    ]
    for i, ((number, stage), came) in enumerate(zip(STAGES, BETWEEN)):
        x = 100 + 158 * i
        lit = everything or number == lesson
        ink = 'white' if lit else INK
        start = 18 if i == 0 else x - 66
        parts += [
            box(x, 50, 92, 52, lit),
            text(x + 46, 72, number, 12, ink),
            text(x + 46, 91, stage, 16, ink),
            arrow((start, 76), (x - 2, 76)),
            text((start + x) // 2 - 2, 66, came, 11),
        ]
    end = 100 + 158 * 3 + 46
    parts += [
        arrow((end, 102), (end, 136), (146, 136), (146, 104)),
        text((146 + end) // 2, 154, 'new weights: the next epoch draws with them', 12),
        box(722, 50, 130, 92, lesson == '06'),
        text(787, 74, '06', 12, 'white' if lesson == '06' else INK),
        text(787, 98, 'the same with', 14, 'white' if lesson == '06' else INK),
        text(787, 118, 'Stable Diffusion', 14, 'white' if lesson == '06' else INK),
        '</svg>\n',
    ]
    return '\n'.join(parts)


def decisions() -> str:
    "Denoising as a chain: states, the action between two of them, the reward at the end."
    states = ['x_T: noise', 'x_T-1', '...', 'x_1', 'x_0: latents']
    parts = [*opening(860, 150)]
    for i, state in enumerate(states):
        x = 10 + 150 * i
        parts += [box(x, 50, 92, 40, lit=False), text(x + 46, 75, state, 14)]
        if i < 4:
            parts += [arrow((x + 92, 70), (x + 148, 70)), text(x + 121, 42, 'action', 12)]
    parts += [
        text(70, 112, 'state: prompt, t, latents', 12),
        text(385, 112, 'each action is drawn from the policy, a Gaussian around the mean', 12),
        text(385, 130, "that the UNet's prediction gives", 12),
        arrow((702, 70), (756, 70)),
        box(758, 50, 92, 40, lit=True),
        text(804, 75, 'reward', 14, 'white'),
        text(804, 112, 'of the picture', 12),
        '</svg>\n',
    ]
    return '\n'.join(parts)


if __name__ == '__main__':
    for number in range(7):
        path = Path(__file__).with_name(f'roadmap_0{number}.svg')
        path.write_text(roadmap(f'0{number}'), encoding='utf-8')
    Path(__file__).with_name('decisions.svg').write_text(decisions(), encoding='utf-8')
