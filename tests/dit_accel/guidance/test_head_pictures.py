"""Pictures of a search: effects of heads as a map, and as a sheet of images."""

import numpy as np
import pytest
from painted_heads import PAIRS, hunter

from dit_accel.guidance.head_pictures import HEADER, LABEL, effects_sheet, heat_map


def test_heat_map(flux, tmp_path):
    found = hunter(flux, tmp_path).run()
    figure = heat_map(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    first, second = (panel.images[0].get_array().filled(np.nan) for panel in figure.axes[:2])
    assert first[1].tolist() == pytest.approx([8, 1], abs=1e-4)  # images are float32
    assert second[0].tolist() == pytest.approx([3, 15], abs=1e-4)
    assert np.isnan(second[1, 0])
    assert np.isnan(second[2, 0])  # chosen before


def test_sheet(flux, tmp_path):
    search = hunter(flux, tmp_path, heads=[(1, 0), (1, 1), (2, 0)], rounds=1, top_k=1)
    found = search.run()

    def image(heads):
        small = search.trials.image(search.perturbation(heads), PAIRS[0])
        return None if small is None else small.repeat(32, axis=0).repeat(32, axis=1)

    sheet = effects_sheet(found, image)
    assert sheet.shape == (HEADER + 4 * 128, LABEL + 3 * 128, 3)
    middle = sheet[HEADER + 64 :: 128, LABEL + 64 :: 128, 0]
    assert middle.tolist() == [[50, 255, 255], [50, 58, 51], [50, 56, 255], [50, 255, 255]]
    corners = sheet[HEADER::128, LABEL::128].tolist()
    assert corners[1][1] == [214, 39, 40]  # (1, 0) was chosen
    assert corners[1][2] != [214, 39, 40]
