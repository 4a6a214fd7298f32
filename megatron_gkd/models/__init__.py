"""From config.json to Megatron-Core's GPTModel, and the schedules that run it."""
