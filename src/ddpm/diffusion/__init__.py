"""The maths: schedules, the process, objectives, the denoiser, samplers."""
