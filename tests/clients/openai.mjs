// Every way to steer with OpenAI's Node client; prints one JSON object.
import OpenAI from "openai";

const [baseURL, model, profile, content, strength] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const ways = {
  name: { model: `${model}@${profile}` },
  body: { model, steering_profile: { name: profile, strength: Number(strength) } },
};
const found = {};

for (const [way, fields] of Object.entries(ways)) {
  const chat = { ...fields, messages: [{ role: "user", content }], temperature: 0, max_tokens: 16 };
  const answer = await client.chat.completions.create(chat);
  found[`chat ${way}`] = [answer.choices[0].message.content, answer.steering];

  const streamed = ["", null];
  for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
    streamed[0] += chunk.choices[0]?.delta?.content ?? "";
    streamed[1] = chunk.steering ?? streamed[1];
  }
  found[`chat ${way} stream`] = streamed;

  const asked = { ...fields, input: content, temperature: 0, max_output_tokens: 16 };
  const response = await client.responses.create(asked);
  found[`responses ${way}`] = [response.output_text, response.steering];

  const events = ["", null];
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    if (event.type === "response.output_text.delta") events[0] += event.delta;
    events[1] = event.response?.steering ?? events[1];
  }
  found[`responses ${way} stream`] = events;
}

const models = [];
for await (const card of client.models.list()) models.push(card.id);
const refusal = await client.chat.completions
  .create({ model: `${model}@unknown`, messages: [{ role: "user", content }] })
  .catch((error) => [error.constructor.name, error.status, error.code]);
console.log(JSON.stringify({ found, models, refusal }));
