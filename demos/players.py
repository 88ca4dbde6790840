"""Components of our own: videos that start, stop and seek together, and the figures under a result."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

import gradio as gr

from .runs import Shown

_PLAYERS = """
<div class="players" data-count="${(value || []).length}">
  <div class="videos">
    {{#each value}}
    <figure><video src="{{this.src}}" muted playsinline preload="auto"></video>
    <figcaption>{{this.label}}</figcaption></figure>
    {{/each}}
  </div>
  <div class="bar">
    <button type="button" class="play" aria-label="play or pause both">Play</button>
    <input class="seek" type="range" min="0" max="1" step="any" value="0" aria-label="position of both">
  </div>
  <p class="empty">The videos appear here.</p>
</div>
"""

# the first video leads; the others follow its start, stop, place and end
_TOGETHER = """
const wire = () => {
  const videos = [...element.querySelectorAll('video')];
  const button = element.querySelector('.play'), seek = element.querySelector('.seek');
  if (!videos.length) return;
  const [lead, ...others] = videos;
  const name = () => { button.textContent = lead.paused ? 'Play' : 'Pause'; };
  const align = (slack) => others.forEach(video => {
    if (Math.abs(video.currentTime - lead.currentTime) > slack) video.currentTime = lead.currentTime;
  });
  const start = () => { align(0); return Promise.all(videos.map(video => video.play())).catch(() => {}); };
  const stop = () => { videos.forEach(video => video.pause()); align(0); };
  button.onclick = () => lead.paused ? start() : stop();
  seek.oninput = () => {
    stop();
    videos.forEach(video => { video.currentTime = seek.value * (video.duration || 0); });
  };
  lead.onplay = lead.onpause = name;
  lead.ontimeupdate = () => {
    if (!lead.paused) { align(0.1); seek.value = lead.duration ? lead.currentTime / lead.duration : 0; }
  };
  lead.onended = () => { videos.forEach(video => { video.currentTime = 0; }); start(); };
  start().then(name);
};
watch('value', wire);
wire();
"""

_FIGURES = """
<div class="figures">
  {{#each value}}
  <section><h3>{{this.label}}</h3>
    <dl>
      <div><dt>time</dt><dd>{{this.time}}</dd></div>
      <div><dt>per step</dt><dd>{{this.step}}</dd></div>
      {{#if this.faster}}
      <div class="{{this.mark}}"><dt>speed-up of a step</dt><dd>{{this.faster}}</dd></div>
      {{/if}}
      <div><dt>pairs computed</dt><dd>{{this.share}}</dd></div>
      {{#if this.quality}}<div><dt>PSNR to dense</dt><dd>{{this.quality}}</dd></div>{{/if}}
    </dl>
  </section>
  {{/each}}
</div>
"""


def players(**options: object) -> gr.HTML:
    """Videos side by side under one control; its value is that of `sources`."""
    return gr.HTML(value=[], html_template=_PLAYERS, js_on_load=_TOGETHER, **options)


def sources(shown: Sequence[Shown]) -> list[dict[str, str]]:
    """Videos as the players take them: addresses relative to the page, for a server behind another one."""
    return [
        {"src": f"gradio_api/file={quote(str(one.path))}", "label": one.label, "path": str(one.path)}
        for one in shown
    ]


def figures_area(**options: object) -> gr.HTML:
    """What stands under a result; its value is that of `for_people`."""
    return gr.HTML(value=[], html_template=_FIGURES, js_on_load="", **options)


def for_people(rows: Sequence[dict]) -> list[dict]:
    """`runs.figures` with what people read beside the numbers."""
    return [
        {
            **row,
            "time": f"{row['seconds']:.2f} s",
            "step": f"{row['step_seconds'] * 1000:.0f} ms",
            "share": "not known" if row["density"] is None else f"{row['density']:.1%}",
            "mark": "best" if (row["speedup"] or 0) > 1 else "",
            "faster": None if row["speedup"] is None else f"{row['speedup']:.2f}×",
            "quality": "identical" if row["identical"] else row["psnr"] and f"{row['psnr']:.1f} dB",
        }
        for row in rows
    ]
