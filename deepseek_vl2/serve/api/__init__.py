"""A server that speaks the OpenAI chat protocol: `python -m deepseek_vl2.serve.api --model_path M`."""
