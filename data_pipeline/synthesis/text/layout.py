"""Complex layouts: slides, posters, infographics, tables and comics, each with random content and arrangement."""

from data_pipeline.synthesis.text.comics import draw_comic
from data_pipeline.synthesis.text.job import Job, Sample
from data_pipeline.synthesis.text.slides import draw_poster, draw_slide
from data_pipeline.synthesis.text.tables import draw_infographic, draw_table

LAYOUTS = (draw_slide, draw_poster, draw_infographic, draw_table, draw_comic)


def draw_layout(job: Job) -> Sample:
    """Draws a random layout. Raises Unsuitable."""
    return job.pick(*LAYOUTS)(job)
