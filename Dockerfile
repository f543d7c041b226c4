# The package and what it needs; the job's own arguments follow the image's name.
FROM python:3.11-slim
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir .
ENTRYPOINT ["distrain"]
