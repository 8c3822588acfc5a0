// Command client talks to a Sluice server as a program in Go does: by grpc-go, which is not our gRPC.
//
//	client [-roots FILE] TARGET CHECK...
//
// Each check prints its facts as lines of JSON, which the tests judge; a check that cannot go on ends the program with the
// reason and exit code 1. All use the model "echo": X FP32 [rows, columns] -> Y, unchanged.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

const (
	serviceName = "inference.GRPCInferenceService"
	model       = "echo"
	// Elements of a small request, which is always one row.
	small = 4
	// What hangs fails after so long; on a loaded machine nothing here takes seconds.
	patience = 20 * time.Second
	// Short for the test's sake, and far above a round trip.
	shortDeadline = 300 * time.Millisecond
	// Many times HTTP/2's first window of 64 KiB, and below grpc-go's limit of 4 MiB for an answer.
	large = 3 << 20 / 4
	// More calls than one batch of the model takes.
	parallelCalls = 64
	streamed      = 20
)

type facts map[string]any

type client struct {
	conn      *grpc.ClientConn
	reflector *reflector
	methods   protoreflect.MethodDescriptors
	wire      *wire
}

var checks = map[string]func(context.Context, *client) (facts, error){
	"health":     health,
	"watch":      watch,
	"reflection": reflection,
	"live":       live,
	"infer":      infer,
	"large":      uncompressed,
	"gzip":       compressed,
	"parallel":   parallel,
	"stream":     stream,
	"error":      refusal,
	"deadline":   deadline,
	"cancel":     cancelled,
}

func main() {
	log.SetFlags(0)
	roots := flag.String("roots", "", "PEM file of who the server's certificate is trusted by; TLS when given")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	connected, err := connect(ctx, flag.Arg(0), *roots)
	if err != nil {
		log.Fatalf("%s: %v", flag.Arg(0), err)
	}
	for _, name := range flag.Args()[1:] {
		check, known := checks[name]
		if !known {
			log.Fatalf("no check %q", name)
		}
		found, err := check(ctx, connected)
		if err != nil {
			log.Fatalf("%s: %v", name, err)
		}
		report(found)
	}
}

func report(found facts) {
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		log.Fatal(err)
	}
}

func connect(ctx context.Context, target, roots string) (*client, error) {
	var err error
	security := insecure.NewCredentials()
	if roots != "" {
		if security, err = credentials.NewClientTLSFromFile(roots, ""); err != nil {
			return nil, err
		}
	}
	c := &client{wire: new(wire)}
	c.conn, err = grpc.NewClient(target, grpc.WithTransportCredentials(security), grpc.WithStatsHandler(c.wire))
	if err != nil {
		return nil, err
	}
	if c.reflector, err = newReflector(ctx, c.conn); err != nil {
		return nil, err
	}
	service, err := c.reflector.service(serviceName)
	if err != nil {
		return nil, err
	}
	c.methods = service.Methods()
	return c, nil
}

func (c *client) method(name protoreflect.Name) method {
	return method{c.conn, c.methods.ByName(name)}
}

// infer has rows echoed, and fails when the answer is not what was sent.
func (c *client) infer(ctx context.Context, fields facts, options ...grpc.CallOption) (protoreflect.Message, error) {
	answer, err := c.method("ModelInfer").call(ctx, fields, options...)
	if err != nil {
		return nil, err
	}
	sent, got := fields["raw_input_contents"].([][]byte)[0], rawOutput(answer)
	if !bytes.Equal(sent, got) {
		return nil, fmt.Errorf("the answer has other bytes (%d) than the request (%d)", len(got), len(sent))
	}
	return answer, nil
}

// request gives the fields of a request for one row in which every element has the same value.
func request(model, id string, columns int, value float32) facts {
	var raw []byte
	for range columns {
		raw, _ = binary.Append(raw, binary.LittleEndian, value) // of a float it cannot fail
	}
	return facts{
		"model_name":         model,
		"id":                 id,
		"inputs":             []facts{{"name": "X", "datatype": "FP32", "shape": []int{1, columns}}},
		"raw_input_contents": [][]byte{raw},
	}
}

func rawOutput(answer protoreflect.Message) []byte {
	contents := field(answer, "raw_output_contents").List()
	if contents.Len() != 1 {
		return nil
	}
	return contents.Get(0).Bytes()
}

func outcome(err error) facts {
	ended := status.Convert(err)
	return facts{"code": ended.Code().String(), "message": ended.Message()}
}

func health(ctx context.Context, c *client) (facts, error) {
	found := facts{}
	for _, service := range []string{"", model, "nope"} {
		answer, err := healthpb.NewHealthClient(c.conn).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
		if found[service] = answer.GetStatus().String(); err != nil {
			found[service] = status.Code(err).String()
		}
	}
	return found, nil
}

// watch reports each status of the server as it comes, and at last how the stream ended.
func watch(ctx context.Context, c *client) (facts, error) {
	updates, err := healthpb.NewHealthClient(c.conn).Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return nil, err
	}
	for {
		update, err := updates.Recv()
		if err == io.EOF {
			return facts{"code": codes.OK.String()}, nil
		}
		if err != nil {
			return outcome(err), nil
		}
		report(facts{"status": update.GetStatus().String()})
	}
}

func reflection(_ context.Context, c *client) (facts, error) {
	services, err := c.reflector.services()
	return facts{"services": services, "methods": c.methods.Len()}, err
}

func live(ctx context.Context, c *client) (facts, error) {
	answer, err := c.method("ServerLive").call(ctx, facts{})
	if err != nil {
		return nil, err
	}
	return facts{"live": field(answer, "live").Bool()}, nil
}

func infer(ctx context.Context, c *client) (facts, error) {
	ctx, cancel := context.WithTimeout(ctx, patience/2)
	defer cancel()
	answer, err := c.infer(ctx, request(model, "first", small, 1.5))
	if err != nil {
		return nil, err
	}
	names := facts{}
	for _, name := range []protoreflect.Name{"id", "model_name", "model_version"} {
		names[string(name)] = field(answer, name).String()
	}
	return names, nil
}

func uncompressed(ctx context.Context, c *client) (facts, error) {
	answer, err := c.infer(ctx, request(model, "", large, 1))
	if err != nil {
		return nil, err
	}
	return facts{"bytes": len(rawOutput(answer))}, nil
}

func compressed(ctx context.Context, c *client) (facts, error) {
	if _, err := c.infer(ctx, request(model, "", large, 1), grpc.UseCompressor(gzip.Name)); err != nil {
		return nil, err
	}
	return c.wire.facts(), nil
}

func parallel(ctx context.Context, c *client) (facts, error) {
	var group sync.WaitGroup
	errs := make([]error, parallelCalls)
	for i := range errs {
		group.Go(func() { _, errs[i] = c.infer(ctx, request(model, "", small, float32(i))) })
	}
	group.Wait()
	return facts{"calls": parallelCalls}, errors.Join(errs...)
}

// stream waits for each answer in the first half; in the second it sends all requests, half-closes and then listens.
func stream(ctx context.Context, c *client) (facts, error) {
	method := c.method("ModelStreamInfer")
	talk, err := method.stream(ctx)
	if err != nil {
		return nil, err
	}
	var heard []string
	hear := func() error {
		answer := dynamicpb.NewMessage(method.descriptor.Output())
		if err := talk.RecvMsg(answer); err != nil {
			return err
		}
		heard = append(heard, told(answer))
		return nil
	}
	for i := range streamed {
		name := model
		if i%(streamed/2) == 2 {
			name = "nope"
		}
		message, err := method.request(request(name, fmt.Sprint(i), small, float32(i)))
		if err == nil {
			err = talk.SendMsg(message)
		}
		if err == nil && i < streamed/2 {
			err = hear()
		}
		if err != nil {
			return nil, err
		}
	}
	err = talk.CloseSend()
	for err == nil {
		err = hear()
	}
	if err != io.EOF {
		return nil, err
	}
	return facts{"heard": heard}, nil
}

// told gives what a message of a stream says: the error, or the id and the last value.
func told(answer protoreflect.Message) string {
	if text := field(answer, "error_message").String(); text != "" {
		return text
	}
	response := field(answer, "infer_response").Message()
	var values [small]float32
	if _, err := binary.Decode(rawOutput(response), binary.LittleEndian, &values); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s: %g", field(response, "id").String(), values[small-1])
}

func refusal(ctx context.Context, c *client) (facts, error) {
	_, err := c.infer(ctx, request("nö 100%", "", small, 0))
	return outcome(err), nil
}

func deadline(ctx context.Context, c *client) (facts, error) {
	ctx, cancel := context.WithTimeout(ctx, shortDeadline)
	defer cancel()
	_, err := c.infer(ctx, request(model, "", small, 0))
	return outcome(err), nil
}

// cancelled calls, and cancels when a line on stdin says that the call has arrived.
func cancelled(ctx context.Context, c *client) (facts, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		cancel()
	}()
	_, err := c.infer(ctx, request(model, "", small, 0))
	return outcome(err), nil
}

// wire remembers what the last messages of a call were on the wire. Calls at the same time would mix.
type wire struct {
	mutex sync.Mutex
	last  facts
}

func (*wire) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (*wire) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (*wire) HandleConn(context.Context, stats.ConnStats)                       {}

func (w *wire) HandleRPC(_ context.Context, event stats.RPCStats) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	switch event := event.(type) {
	case *stats.OutPayload:
		w.last = facts{"sent": event.Length, "sent_compressed": event.CompressedLength}
	case *stats.InHeader:
		w.last["encoding"] = event.Compression
	case *stats.InPayload:
		w.last["received"] = event.Length
		w.last["received_compressed"] = event.CompressedLength
	}
}

func (w *wire) facts() facts {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	return maps.Clone(w.last)
}
