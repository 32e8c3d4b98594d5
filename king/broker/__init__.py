"""Message brokers: RabbitMQ and Redis."""
